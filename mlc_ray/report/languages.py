"""English names of languages, for people who do not know every code by heart. An unknown code stands for itself."""

from __future__ import annotations

# ISO 639-1 and 639-3 codes with the English names of the standard's own register, shortened where it lists several.
_NAMES = """
af Afrikaans|am Amharic|ar Arabic|arz Egyptian Arabic|as Assamese|az Azerbaijani|be Belarusian|bg Bulgarian|bn Bengali
|bo Tibetan|br Breton|bs Bosnian|ca Catalan|ceb Cebuano|ckb Central Kurdish|cs Czech|cy Welsh|da Danish|de German
|el Greek|en English|eo Esperanto|es Spanish|et Estonian|eu Basque|fa Persian|fi Finnish|fil Filipino|fr French
|ga Irish|gd Scottish Gaelic|gl Galician|gn Guarani|gu Gujarati|ha Hausa|he Hebrew|hi Hindi|hr Croatian|ht Haitian
|hu Hungarian|hy Armenian|id Indonesian|ig Igbo|is Icelandic|it Italian|ja Japanese|jv Javanese|ka Georgian|kk Kazakh
|km Khmer|kn Kannada|ko Korean|ku Kurdish|ky Kyrgyz|la Latin|lb Luxembourgish|lg Ganda|ln Lingala|lo Lao|lt Lithuanian
|lv Latvian|mg Malagasy|mi Maori|mk Macedonian|ml Malayalam|mn Mongolian|mr Marathi|ms Malay|mt Maltese|my Burmese
|nb Norwegian Bokmål|ne Nepali|nl Dutch|nn Norwegian Nynorsk|no Norwegian|ny Chichewa|om Oromo|or Odia|pa Punjabi
|pl Polish|ps Pashto|pt Portuguese|qu Quechua|ro Romanian|ru Russian|rw Kinyarwanda|sa Sanskrit|sd Sindhi|si Sinhala
|sk Slovak|sl Slovenian|sn Shona|so Somali|sq Albanian|sr Serbian|st Southern Sotho|su Sundanese|sv Swedish|sw Swahili
|ta Tamil|te Telugu|tg Tajik|th Thai|ti Tigrinya|tk Turkmen|tl Tagalog|tn Tswana|tr Turkish|ts Tsonga|tt Tatar
|ug Uyghur|uk Ukrainian|ur Urdu|uz Uzbek|vi Vietnamese|wo Wolof|xh Xhosa|yi Yiddish|yo Yoruba|yue Cantonese|zh Chinese
|zu Zulu|aa Afar|ab Abkhazian|ak Akan|an Aragonese|ary Moroccan Arabic|av Avaric|ay Aymara|ba Bashkir|bho Bhojpuri
|bi Bislama|bm Bambara|ce Chechen|ch Chamorro|co Corsican|cr Cree|cv Chuvash|dv Dhivehi|dz Dzongkha|ee Ewe|ff Fulah
|fj Fijian|fo Faroese|fy Western Frisian|gv Manx|ho Hiri Motu|hz Herero|ia Interlingua|ii Sichuan Yi|ik Inupiaq
|ilo Iloko|io Ido|iu Inuktitut|kg Kongo|ki Kikuyu|kj Kuanyama|kl Kalaallisut|kr Kanuri|ks Kashmiri|kv Komi|kw Cornish
|li Limburgish|lu Luba-Katanga|mai Maithili|mh Marshallese|na Nauru|nd North Ndebele|ng Ndonga|nr South Ndebele
|nv Navajo|oc Occitan|oj Ojibwa|os Ossetian|pap Papiamento|pi Pali|rm Romansh|rn Rundi|sc Sardinian|se Northern Sami
|sg Sango|sm Samoan|ss Swati|to Tonga|tw Twi|ty Tahitian|ve Venda|vo Volapük|wa Walloon|za Zhuang
"""
NAMES = dict(item.strip().split(" ", 1) for item in _NAMES.split("|"))
_SCRIPTS = {
    "Hans": "simplified",
    "Hant": "traditional",
    "Latn": "Latin script",
    "Cyrl": "Cyrillic",
    "Arab": "Arabic script",
}


def language_name(code: str) -> str:
    """`Chinese (traditional)` for `zh-Hant`; empty where the language is not known here."""
    primary, *more = code.split("-")
    name = NAMES.get(primary, "")
    if name and more:
        return f"{name} ({', '.join(_SCRIPTS.get(part, part) for part in more)})"
    return name


def name_and_code(code: str) -> str:
    """`Spanish (es)`; the code alone where the language has no known name."""
    name = language_name(code)
    return f"{name} ({code})" if name else code
