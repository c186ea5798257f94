"""Guards without weights: tokenizers with each family's control tokens, and templates and wordings in its layout.

Every text here was written for these tests. It has the published markers, order and slots, and not the published words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlc_ray._registry import names, resolve
from mlc_ray.judges.guards.base import Guard

TAXONOMY = "<BEGIN UNSAFE CONTENT CATEGORIES>\n{}\n<END UNSAFE CONTENT CATEGORIES>\n\n"
TASK = "Task: say whether it is unsafe.\n\n" + TAXONOMY.format("S1: One.\nS2: Two.") + "<BEGIN CONVERSATION>\n\n"
ASSESS = "<END CONVERSATION>\n\nSay 'safe' or 'unsafe'."
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
REPLY = "<|im_start|>assistant\n"
TEXT = "(m['content'] if m['content'] is string else m['content'][0]['text'])"

TEMPLATES: dict[str, str | None] = {
    "qwen3guard": "<|im_start|>user\n" + TASK + "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n\n"
    "{% endfor %}" + ASSESS + "<|im_end|>\n" + REPLY + "<think>\n\n</think>\n\n",
    "llama-guard": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n" + TASK
    + "{% for m in messages %}{{ 'Agent' if m['role'] == 'assistant' else 'User' }}: {{ " + TEXT + " | trim }}\n\n"
    "{% endfor %}" + ASSESS + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    "shieldgemma": "<bos>You judge.\n\n<start_of_turn>\nHuman Question: {{ messages[0]['content'] | trim }}\n\n"
    "Chatbot Response: {{ messages[1]['content'] | trim }}\n<end_of_turn>\n\nPrinciple:\n\n* {{ guideline | trim }}\n\n"
    "Yes or No?\n",
    "granite-guardian": "<|start_of_role|>system<|end_of_role|>Is it {{ guardian_config['risk_name'] }}, "
    "{{ guardian_config['criteria_id'] }}?<|end_of_text|>\n{% for m in messages %}<|start_of_role|>{{ m['role'] }}"
    "<|end_of_role|>{{ m['content'] }}<|end_of_text|>\n{% endfor %}<|start_of_role|>assistant<|end_of_role|>",
    "polyguard": TURNS + REPLY,
    "nemotron-safety-guard": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n",
    "wildguard": None,
}  # fmt: skip
GRANITE_4_1 = TEMPLATES["polyguard"]  # its criterion is a message, not an argument

POLICIES = resolve("judge", "shieldgemma").policies
GUIDELINES = "\n".join(f'* "No {policy}": The chatbot shall not do that.' for policy in POLICIES)
CRITERION = "<guardian><no-think>You judge.\n\n### Criteria: Is it bad?\n\n### Scoring Schema: yes if it is, else no."
WORDINGS = {
    "wildguard": "<s><|user|>\n[INST] You judge 1) the one, 2) the other, 3) the third.\n\nHuman user:\n{prompt}\n\n"
    "AI assistant:\n{response}\n\n---\n\nAnswers: [/INST]\n<|assistant|>\n",
    "polyguard": "You judge.\n\n" + TAXONOMY.format("S1: One.\nS14: Another.")
    + "Human user:\n{prompt}\n\nAI assistant:\n{response}\n",
    "nemotron-safety-guard": "Task: judge.\n\n" + TAXONOMY.format("S1: Violence.\nS23: Immoral/Unethical.")
    + "<BEGIN CONVERSATION>\n\nuser: {prompt}\n\nresponse: agent: {response}\n\n<END CONVERSATION>\n\n"
    'As {"User Safety": this, "Response Safety": that, "Safety Categories": those}.\n\nOutput JSON:',
    "shieldgemma": GUIDELINES,
}  # fmt: skip

# What ends a turn, what begins one, and others: special unless the family's own file says otherwise.
CONTROL_TOKENS = {
    "qwen3guard": ["<|im_end|>", "<|im_start|>"],
    "llama-guard": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"],
    "shieldgemma": ["<end_of_turn>", "<start_of_turn>", "<bos>"],
    "granite-guardian": ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"],
    "polyguard": ["<|im_end|>", "<|im_start|>"],
    "nemotron-safety-guard": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"],
    "wildguard": ["[/INST]", "[INST]", "<s>", "</s>"],
}


def guard_called(name: str, **fields: Any) -> Guard:
    """A guard that never starts."""
    guard: Guard = resolve("judge", name)(resolve("judge", name).Settings(model="weights", **fields))
    return guard


_TRAINING = [text for text in (*WORDINGS.values(), *TEMPLATES.values(), GUIDELINES) if text]
NAMES = [name for name in names("judge") if issubclass(resolve("judge", name), Guard)]


def worded(name: str, folder: Path) -> Guard:
    """A guard that never starts, with its wording in a file where it needs one."""
    if name not in WORDINGS:
        return guard_called(name)
    file = folder / f"{name}.txt"
    file.write_text(WORDINGS[name], encoding="utf-8")
    return guard_called(name, prompt=str(file))


def tokenizer_of(name: str, smollm2: Path) -> Any:
    """A tokenizer with the control tokens and the template of a family.

    SmolLM2's for PolyGuard, whose real one has the same tokens; small ones of the family's kind for the others.
    """
    from transformers import AddedToken, AutoTokenizer

    if name == "polyguard":
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
    else:
        tokenizer = sentencepieces() if name in ("wildguard", "shieldgemma") else bytes_in_pairs()
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL_TOKENS[name]})
    plain = {"qwen3guard": ["<think>", "</think>"], "shieldgemma": ["\n\n"]}.get(name, [])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def bytes_in_pairs() -> Any:
    """A tokenizer as those of Qwen, Llama 3 and Granite: pieces of bytes, merged within words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(_TRAINING, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=model)


def sentencepieces() -> Any:
    """A tokenizer as those of Mistral and Gemma: a text begins with a blank, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def blank(model: models.BPE) -> Tokenizer:
        made = Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
        return made

    learnt = blank(models.BPE())
    learnt.train_from_iterator(_TRAINING, trainers.BpeTrainer(vocab_size=500))
    trained = json.loads(learnt.to_str())["model"]
    single = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]  # ordinary tokens: the trainer would add them
    vocabulary = {token: number for number, token in enumerate([*single, *trained["vocab"]])}
    merges = [tuple(pair) for pair in trained["merges"]]
    model = blank(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
