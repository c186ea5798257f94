"""Multilingual consistency (MLC) in plain PyTorch: the whole method on one page.

A safety-aligned model refuses a harmful request in English, and may well comply in Swahili. MLC (arXiv 2602.16660) asks
for no answers in Swahili. Its data are *bundles*: one request in several languages, with a chosen and a rejected answer
in English. Two losses are added:

    alignment    any preference loss on the English answers; here DPO
    consistency  the model's state after reading the request, one row per language, should point one way in all of them

Training moves English, and consistency makes the other languages follow.

    python examples/mlc_in_plain_torch.py MODEL_FOLDER [BUNDLES.jsonl]
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import mlc_ray
from mlc_ray import mlc_loss

LANGUAGES = ["en", "es", "fr", "sw"]
TRAINED, HELD_OUT, BUNDLES_PER_STEP = 16, 6, 2
BETA, MLC_WEIGHT, EXTRACTOR_DIM, LEARNING_RATE = 0.1, 0.8, 512, 2e-5


class Method(torch.nn.Module):
    """The policy, its frozen reference, and the extractor: a linear map that is trained along and then thrown away."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.extractor = torch.nn.Linear(self.policy.config.hidden_size, EXTRACTOR_DIM)

    def prompt_ids(self, text: str) -> list[int]:
        """A request as the model's chat template renders it, up to where the answer begins."""
        chat = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return ids  # type: ignore[return-value]

    def answer_log_probs(self, model: torch.nn.Module, prompts: list[str], answers: list[str]) -> torch.Tensor:
        """log p(answer | prompt) of each pair [B], summed over the answer's tokens."""
        before = [self.prompt_ids(prompt) for prompt in prompts]
        after = [self.tokenizer.encode(text + self.tokenizer.eos_token, add_special_tokens=False) for text in answers]
        ids, mask = padded([prompt + answer for prompt, answer in zip(before, after, strict=True)])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        log_probs = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        starts = torch.tensor([len(prompt) for prompt in before]).unsqueeze(1)
        is_answer = (torch.arange(1, ids.shape[1]) >= starts) & mask[:, 1:].bool()
        return (log_probs * is_answer).sum(dim=1)

    def alignment(self, bundles: list[dict]) -> torch.Tensor:  # type: ignore[type-arg]
        """DPO on the English answers: prefer the chosen one by more than the reference does."""
        english = [bundle["prompts"]["en"] for bundle in bundles]
        margin = torch.zeros(len(bundles))
        for sign, key in ((1, "chosen"), (-1, "rejected")):
            answers = [bundle[key] for bundle in bundles]
            with torch.no_grad():
                reference = self.answer_log_probs(self.reference, english, answers)
            margin = margin + sign * (self.answer_log_probs(self.policy, english, answers) - reference)
        return -F.logsigmoid(BETA * margin).mean()

    def consistency(self, bundles: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[type-arg]
        """The MLC loss, and the leading share: 1 when the languages of each bundle all point one way.

        Each bundle is a matrix Z [languages, EXTRACTOR_DIM] with rows of unit length. Were they all collinear, Z would
        have one singular value s1 > 0 and the others 0; the loss is the cross-entropy of softmax(s / s1 / 0.2) against
        s1, which for four languages is then 0.0200, the least it can be.
        """
        prompts = [self.prompt_ids(bundle["prompts"][language]) for bundle in bundles for language in LANGUAGES]
        ids, mask = padded(prompts)
        states = self.policy.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        last = states[torch.arange(len(prompts)), mask.sum(dim=1) - 1]  # after the last token: all is read
        loss, s = mlc_loss(self.extractor(last).view(len(bundles), len(LANGUAGES), EXTRACTOR_DIM))
        return loss, (s[:, 0].square() / s.square().sum(dim=1)).mean()


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [rows, longest], padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()


def main(folder: str, file: str) -> dict[str, tuple[float, float]]:
    """Train on some bundles; loss/mlc and leading share on others, held out, before and after."""
    bundles = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    bundles = [bundle for bundle in bundles if bundle["kind"] == "harmful"]
    train, held_out = bundles[:TRAINED], bundles[-HELD_OUT:]
    torch.manual_seed(0)
    method = Method(folder)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)

    def measure(when: str) -> tuple[float, float]:
        with torch.no_grad():
            loss, share = map(float, method.consistency(held_out))
        print(f"{when:>6}  held-out bundles: loss/mlc {loss:.4f}  leading share {share:.4f}", flush=True)
        return loss, share

    results = {"before": measure("before")}
    for step, first in enumerate(range(0, TRAINED, BUNDLES_PER_STEP), start=1):
        batch = train[first : first + BUNDLES_PER_STEP]
        alignment, (mlc, share) = method.alignment(batch), method.consistency(batch)
        (alignment + MLC_WEIGHT * mlc).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{step:>6}  loss/alignment {alignment:.4f}  loss/mlc {mlc:.4f}  leading share {share:.4f}", flush=True)
    results["after"] = measure("after")
    return results


if __name__ == "__main__":
    shipped = Path(mlc_ray.__file__).parent / "data" / "sample" / "train.jsonl"
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else str(shipped))
