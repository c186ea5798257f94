"""Templates in the style of ChatML, Gemma and Llama 3, on a small tokenizer trained here, and the real SmolLM2."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlc_ray.config import ChatSection
from mlc_ray.data.bundles import BundleError, make_bundle
from mlc_ray.data.tokens import (
    NO_PROMPT,
    ChatTemplate,
    TemplateError,
    TokenizationError,
    load_tokenizer,
    tokenize_bundle,
)

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3's: it asks what texts hold, and what it writes of an answer depends on it
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if m.content.startswith('<tool>') and m.content.endswith('</tool>') %}<|im_start|>user\n{{ m.content }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}<|im_end|>\n"
    "{% else %}{% set said = m.content %}{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>assistant\n' + said.lstrip('\n') + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEASURING = CHATML.replace("{{ m.content }}", "{{ m.content if m.content | length < 30 else m.content | string }}")
TEMPLATES = {
    "chatml": CHATML, "gemma": GEMMA, "llama3": LLAMA3, "brackets": BRACKETS, "thinking": THINKING,
    "measuring": MEASURING,
}  # fmt: skip
NASTY = [
    "  spaces around  ",
    "\n\nlines around\n",
    "\u3000\u00a0wide blanks\u2028",
    "quotes \"'<&>\\ and {{ braces }} {% raw %}",
    "quotes <|im_end|>\n<|im_start|>assistant\n itself",
    "<|im_end|",
    "|im_start|>user",
    "<tool>asked</tool>",
    "<tool>asked",
    "<think>\nno\n</think>\n\nyes",
    "qS7zK2vX9w",
    "user",
    "e\u0301 is \u00e9, 👩‍👩‍👧 is one, \u202eright to left",
    "คำถามภาษาไทยที่ไม่มีช่องว่าง" * 20,
]  # fmt: skip
SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
BUNDLE = make_bundle(
    {
        "kind": "benign",
        "prompts": {"en": "How do I boil an egg?", "zh": "怎么煮鸡蛋？", "ur": "انڈا کیسے ابالا جاتا ہے؟"},
        "chosen": "Eight minutes in boiling water.",
        "rejected": "I cannot help with that.",
    }
)


@pytest.fixture(scope="module")
def small():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # As Qwen and Llama 3 split: line breaks stay together whatever follows them.
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["user assistant model system\n \n\n how do I boil an egg in water\n\n"] * 20, trainer)

    def with_template(template):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template = template
        return tokenizer

    return with_template


@pytest.fixture(params=[*TEMPLATES, "smollm2"])
def tokenizer(request, small):
    if request.param == "smollm2":
        return load_tokenizer(str(request.getfixturevalue("smollm2")))
    return small(TEMPLATES[request.param])


def whole(tokenizer, user, assistant=None):
    messages = [{"role": "user", "content": user}]
    messages += [] if assistant is None else [{"role": "assistant", "content": assistant}]
    return tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=assistant is None, return_dict=False
    )


def tokenize(bundle, tokenizer, languages=None, prompt=512, response=512):
    return tokenize_bundle(
        bundle, tokenizer, languages=languages, max_prompt_tokens=prompt, max_response_tokens=response
    )


def test_short_prompts_and_answers_are_the_template_s_own_tokens(tokenizer):
    row = tokenize(BUNDLE, tokenizer)
    assert row.languages == ["en", "ur", "zh"]
    assert row.prompts == [whole(tokenizer, BUNDLE.prompts[code]) for code in row.languages]
    assert row.tapped == [len(ids) - 1 for ids in row.prompts]
    assert row.response_prompt == 0
    prompt = row.prompts[row.response_prompt]
    assert prompt + row.chosen == whole(tokenizer, BUNDLE.prompts["en"], BUNDLE.chosen)
    assert prompt + row.rejected == whole(tokenizer, BUNDLE.prompts["en"], BUNDLE.rejected)
    assert row.truncated_prompt_tokens == row.truncated_response_tokens == 0


def renderings(tokenizer, monkeypatch):
    """The texts that the tokenizer's template is asked to render from now on."""
    asked, render = [], tokenizer.apply_chat_template

    def counting(messages, **settings):
        asked.append(messages[-1]["content"])
        return render(messages, **settings)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    return asked


AT_ONCE, NEVER = -1, 1 << 62
"""From how many texts on they are put together: from the first one, or none is."""


@pytest.mark.parametrize("shortcuts_from", [AT_ONCE, NEVER])
def test_nasty_texts_have_the_ids_of_a_whole_rendering(tokenizer, shortcuts_from):
    template = ChatTemplate(tokenizer, shortcuts_from=shortcuts_from)
    prompts = template.prompt_ids(NASTY)
    assert [ids.tolist() for ids in prompts] == [whole(tokenizer, text) for text in NASTY]
    pairs = [(n, answer) for n in range(len(NASTY)) for answer in NASTY]
    answers = template.answer_ids([(NASTY[n], prompts[n], answer) for n, answer in pairs])
    for (n, answer), ids in zip(pairs, answers, strict=True):
        prompt, conversation = prompts[n].tolist(), whole(tokenizer, NASTY[n], answer)
        if conversation[: len(prompt)] == prompt:
            assert ids.tolist() == conversation[len(prompt) :]
        else:  # the tokenizer would merge across the boundary
            assert tokenizer.decode(prompt + ids.tolist()) == tokenizer.decode(conversation)


@pytest.mark.parametrize(
    ("name", "rendered"), [("chatml", 0), ("llama3", 0), ("brackets", 0), ("thinking", 2), ("measuring", len(NASTY))]
)
def test_texts_are_rendered_only_where_the_template_does_more_than_write_them(small, monkeypatch, name, rendered):
    tokenizer = small(TEMPLATES[name])
    template = ChatTemplate(tokenizer, shortcuts_from=len(NASTY))
    asked = renderings(tokenizer, monkeypatch)
    template.prompt_ids(NASTY)
    assert len(asked) == len(NASTY) and template.shortcuts is None
    template.prompt_ids(NASTY[:1])
    asked.clear()
    template.prompt_ids(NASTY)
    assert len(asked) == rendered


def test_a_template_that_renders_otherwise_than_when_it_was_traced_is_refused(small):
    tokenizer = small(CHATML)
    template = ChatTemplate(tokenizer, shortcuts_from=AT_ONCE)
    template.prompt_ids(["egg"])
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | replace('x', 'y') }}")
    template.shortcuts.verify([("egg", None)])
    with pytest.raises(TemplateError, match=r"renders '.*user\\ny<.*lead to '.*user\\nx<"):
        template.shortcuts.verify([("x", None)])
    bundle = make_bundle({"kind": "benign", "prompts": {"en": "egg", "de": "x"}})
    with pytest.raises(TemplateError, match="lead to"):
        tokenize(bundle, template)


@pytest.mark.parametrize(
    "written",
    [
        "{% macro say(c) %}{{ c }}{% endmacro %}{{ 'a tag' if '</tool>' in say(m.content) else m.content }}",
        "{% set said %}{{ m.content }}{% endset %}{{ 'a tag' if '</tool>' in said else said }}",
        "{{ 'a tag' if '</tool>' in m.content ~ '' else m.content }}",
        "{{ 'a tag' if '</tool>' in [m.content] | join else m.content }}",
        "{{ 'a user' if m.content in 'users' else m.content }}",
        "{{ 'a user' if m.content is in 'users' else m.content }}",
        "{{ 'a user' if 'users'.startswith(m.content) else m.content }}",
    ],
)
def test_what_a_text_cannot_note_is_found_in_the_code(small, written):
    tokenizer = small(CHATML.replace("{{ m.content }}", written))
    template = ChatTemplate(tokenizer, shortcuts_from=AT_ONCE)
    assert [ids.tolist() for ids in template.prompt_ids(NASTY)] == [whole(tokenizer, text) for text in NASTY]


@pytest.mark.parametrize(
    "written",
    [
        r"{% set said = m.content.rstrip('\n') %}{{ said if said else '' }}",
        r"{% if m.content.rstrip('\n') == 'qS' %}{% endif %}{{ m.content }}",
        r"{% if m.content.lstrip('ab') == 'qS' %}{% endif %}{{ m.content | trim }}",
        r"{{ m.content.strip('<>').rstrip('\n ') }}",
        r"{{ m.content.strip() | trim }}",
    ],
)
def test_it_is_learnt_which_stripping_reaches_the_output(small, monkeypatch, written):
    tokenizer = small(CHATML.replace("{{ m.content }}", written))
    template = ChatTemplate(tokenizer, shortcuts_from=AT_ONCE)
    template.prompt_ids([])
    texts = ["egg\n", "\negg", " egg \n", "abegg", "<egg> \n", "eggba"]
    expected = [whole(tokenizer, text) for text in texts]
    asked = renderings(tokenizer, monkeypatch)
    assert [ids.tolist() for ids in template.prompt_ids(texts)] == expected
    assert not asked


@pytest.mark.parametrize("shortcuts_from", [AT_ONCE, NEVER])
@pytest.mark.parametrize("text", [NASTY[0], NASTY[1], NASTY[4], "qS7zK2vX9w", "user"])
def test_awkward_text_moves_no_boundary(tokenizer, text, shortcuts_from):
    template = ChatTemplate(tokenizer, shortcuts_from=shortcuts_from)
    ids, cut = template.encode_prompt(text, 512)
    assert (ids, cut) == (whole(tokenizer, text), 0)
    kept, cut = template.encode_prompt(text * 30, template.minimum + 2)
    assert len(kept) == template.minimum + 2
    assert cut == len(whole(tokenizer, text * 30)) - len(kept)
    assert tokenizer.decode(kept).startswith(template.head)
    assert tokenizer.decode(kept).endswith(template.tail)


def test_a_long_prompt_loses_the_front_of_the_user_s_text_only(tokenizer):
    template = ChatTemplate(tokenizer)
    text = " ".join(str(number) for number in range(200))
    full = whole(tokenizer, text)
    kept, cut = template.encode_prompt(text, len(full) - 7)
    head = len(template.head_ids)
    assert kept == full[:head] + full[head + 7 :]
    assert cut == 7
    decoded = tokenizer.decode(kept)
    assert decoded.startswith(template.head)
    assert decoded.endswith("199" + template.tail)
    assert " 1 2 " not in decoded


def test_cuts_are_counted_and_an_answer_without_its_end_has_no_end_of_turn(small):
    tokenizer = small(CHATML)
    template = ChatTemplate(tokenizer)
    uncut = tokenize(BUNDLE, tokenizer)
    limit = template.minimum + 5
    row = tokenize(BUNDLE, template, prompt=limit, response=4)
    assert row.truncated_prompt_tokens == sum(max(0, len(ids) - limit) for ids in uncut.prompts) > 0
    assert row.chosen == uncut.chosen[:4]
    assert row.truncated_response_tokens == len(uncut.chosen) + len(uncut.rejected) - 8
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in uncut.chosen
    assert end not in row.chosen
    assert row.tapped == [len(ids) - 1 for ids in row.prompts]


def test_an_answer_that_would_melt_into_the_generation_prompt_is_tokenised_alone(small):
    tokenizer = small(CHATML)
    joined = whole(tokenizer, "a", "\nb")
    prompt = whole(tokenizer, "a")
    assert joined[: len(prompt)] != prompt  # this tokenizer has a token for two line breaks
    row = tokenize(make_bundle({"kind": "benign", "prompts": {"en": "a"}, "chosen": "\nb"}), tokenizer)
    assert row.prompts == [prompt]
    assert tokenizer.decode(prompt + row.chosen) == tokenizer.decode(joined)


def test_a_limit_below_the_template_names_the_setting_and_values(tokenizer):
    template = ChatTemplate(tokenizer)
    template.encode_prompt("x", template.minimum)
    with pytest.raises(
        TokenizationError, match=rf"data\.max_prompt_tokens={template.minimum - 1} .* {template.minimum - 1} "
    ):
        template.encode_prompt("x", template.minimum - 1)


def test_answers_in_further_languages_continue_their_own_prompts(small):
    tokenizer = small(GEMMA)
    answers = {"zh": {"chosen": "八分钟。", "rejected": "不。"}, "ur": {"chosen": "آٹھ منٹ"}}
    bundle = make_bundle({"kind": BUNDLE.kind, "prompts": BUNDLE.prompts, "chosen": BUNDLE.chosen, "answers": answers})
    row = tokenize(bundle, tokenizer)
    assert [(row.languages[one["prompt"]], one["rejected"] is None) for one in row.answers] == [
        ("ur", True),
        ("zh", False),
    ]
    for one in row.answers:
        code = row.languages[one["prompt"]]
        for name, text in answers[code].items():
            assert row.prompts[one["prompt"]] + one[name] == whole(tokenizer, BUNDLE.prompts[code], text)
    fewer = tokenize(bundle, tokenizer, ["zh", "en"])
    assert [fewer.languages[one["prompt"]] for one in fewer.answers] == ["zh"]
    cut = tokenize(bundle, tokenizer, response=2)
    assert [one["chosen"] for one in cut.answers] == [one["chosen"][:2] for one in row.answers]
    lost = [row.chosen, *(ids for one in row.answers for ids in (one["chosen"], one["rejected"]) if ids)]
    assert cut.truncated_response_tokens == sum(len(ids) - 2 for ids in lost)


def test_languages_are_restricted_but_an_answer_keeps_its_prompt(small):
    tokenizer = small(GEMMA)
    assert tokenize(BUNDLE, tokenizer, ["zh", "en"]).languages == ["en", "zh"]
    with pytest.raises(BundleError, match=r"data\.languages"):
        tokenize(BUNDLE, tokenizer, ["zh"])
    unanswered = make_bundle({"kind": "harmful", "prompts": {"zh": "x"}})
    row = tokenize(unanswered, tokenizer)
    assert (row.response_prompt, row.chosen, row.rejected) == (NO_PROMPT, None, None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "2 times instead of once"),
        (CHATML.replace("{{ m.content }}", ""), "0 times instead of once"),
        (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", "does not start with"),
    ],
)
def test_unusable_templates_are_refused(small, template, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(small(template))


def test_a_template_that_looks_at_the_text_is_refused(small):
    fickle = CHATML.replace("Be kind.", "{{ 'Short.' if messages[0].content | length < 12 else 'Long.' }}")
    for shortcuts_from in (AT_ONCE, NEVER):
        template = ChatTemplate(small(fickle), shortcuts_from=shortcuts_from)
        with pytest.raises(TemplateError, match="other text around"):
            template.encode_prompt("a much longer text than that", 512)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(TemplateError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))


SPEAKING = "{{ style }}\n" + CHATML
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML


def test_a_system_prompt_and_arguments_are_those_of_the_template(small):
    tokenizer = small(SPEAKING)
    template = ChatTemplate(tokenizer, ChatSection(system="Answer in one word.", arguments={"style": "kind"}))
    messages = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "x"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, style="kind")
    assert template.head + "x" + template.tail == rendered
    assert template.head.startswith("kind\n<|im_start|>system\nAnswer in one word.")
    assert tokenizer.decode(template.encode_prompt("x", 512)[0]) == rendered


def test_a_template_is_told_the_date_of_the_settings_on_every_day(small):
    tokenizer = small(DATED)
    assert ChatTemplate(tokenizer).head.startswith("26 Jul 2024\n")
    assert ChatTemplate(tokenizer, ChatSection(date="2031-02-03")).head.startswith("03 Feb 2031\n")


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (CHATML, {"arguments": {"enable_thinking": False}}, r"'enable_thinking', which .* it reads nothing"),
        (STRICT, {"system": "Be brief."}, "refuses a conversation of system, user.*System role not supported"),
        (CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}"), {"system": "Be brief."},
         "'Be brief.': the chat template leaves it out"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_use_is_refused(small, template, chat, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(small(template), ChatSection(**chat))
