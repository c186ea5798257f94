"""Multilingual consistency (MLC) as a term in TRL's DPOTrainer, for those who train with TRL and want to stay there.

    python examples/mlc_with_trl.py MODEL_FOLDER OUTPUT_FOLDER

The dataset has a further column `translations`: for each row a list of the same request in other languages, an empty
text where a row lacks one. `MlcMixin` adds MLC over the request and its translations to the loss of any trainer derived
from DPOTrainer; what it does not have is what mlc_ray is for: one forward of a prefix tree, a tap below the last layer
behind which prompts go no further, a reference computed once, measures of collapse, and scores with both sides in every
language.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import mlc_ray
from mlc_ray import mlc_loss


class MlcMixin(DPOTrainer):
    """Adds `mlc_weight` x MLC to the loss, on the last prompt token's state at `mlc_layer` of hidden_states.

    The extractor belongs to the model while it trains, so that it is optimised and wrapped with it; call
    `drop_extractor` before the model is saved.
    """

    model: Any
    processing_class: Any
    _signature_columns: Any

    def __init__(
        self, *args: Any, mlc_weight: float = 0.8, mlc_layer: int = -1, extractor_dim: int = 512, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mlc_weight, self.mlc_layer = mlc_weight, mlc_layer
        hidden = self.model.config.get_text_config().hidden_size
        extractor = torch.nn.Linear(hidden, extractor_dim, device=self.model.device)  # float32, whatever the model is
        self.model.mlc_extractor = extractor
        collate = self.data_collator

        def with_prompts(examples: list[dict[str, Any]]) -> dict[str, Any]:
            return {**collate(examples), "mlc_prompts": self._prompts(examples)}

        self.data_collator = with_prompts

    def drop_extractor(self) -> torch.nn.Linear:
        """Take the extractor out of the model, which is then as it was built; returns it."""
        extractor: torch.nn.Linear = self.model.mlc_extractor
        del self.model.mlc_extractor
        return extractor

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        if "translations" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "translations"]

    def _prompts(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Ids [B * L, T] of each row's request and its translations, padded; and which of them there are [B, L]."""
        rows = []
        for example in examples:
            chats = [[{"role": "user", "content": text}] for text in example["translations"]]
            render = self.processing_class.apply_chat_template
            ids = [render(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
            rows.append([example["prompt_ids"], *ids])
        texts = [[True, *map(bool, example["translations"])] for example in examples]
        flat = [torch.tensor(ids) for row in rows for ids in row]
        lengths = torch.tensor([len(ids) for ids in flat])
        padded = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
        mask = (torch.arange(padded.shape[1]) < lengths.unsqueeze(1)).long()
        return {"input_ids": padded, "attention_mask": mask, "present": torch.tensor(texts)}

    def mlc(self, model: torch.nn.Module, prompts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The MLC loss of a batch of prompts, and the mean leading share of its bundles."""
        inputs = {name: prompts[name] for name in ("input_ids", "attention_mask")}
        states = model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        last = prompts["attention_mask"].sum(dim=1) - 1
        tapped = states[self.mlc_layer][torch.arange(len(last), device=last.device), last].float()
        projected = self.accelerator.unwrap_model(model).mlc_extractor(tapped)
        loss, values = mlc_loss(projected.view(*prompts["present"].shape, -1), present=prompts["present"])
        return loss, (values[:, 0].square() / values.square().sum(dim=1)).mean()

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """DPO's loss + mlc_weight * MLC."""
        inputs = dict(inputs)
        prompts = inputs.pop("mlc_prompts")
        result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]
        loss, share = self.mlc(model, prompts)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["mlc/loss"].append(self.accelerator.gather(loss.detach()).mean().item())
        metrics["mlc/leading_share"].append(self.accelerator.gather(share.detach()).mean().item())
        if isinstance(result, tuple):
            return (result[0] + self.mlc_weight * loss, *result[1:])
        return result + self.mlc_weight * loss


class MlcDPOTrainer(MlcMixin, DPOTrainer):
    """DPO + MLC."""


def dataset(file: Path, languages: list[str], count: int) -> Dataset:
    """Bundles as TRL's conversational preference rows, with the other languages beside."""
    bundles = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][:count]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": bundle["prompts"]["en"]}],
                "chosen": [{"role": "assistant", "content": bundle["chosen"]}],
                "rejected": [{"role": "assistant", "content": bundle["rejected"]}],
                "translations": [bundle["prompts"].get(language, "") for language in languages],
            }
            for bundle in bundles
        ]
    )


def make_trainer(folder: str, out: str, *, bundles: int, **settings: Any) -> MlcDPOTrainer:
    """A trainer of the model in `folder` on bundles of the shipped sample, in English, Spanish, French and Swahili."""
    sample = Path(mlc_ray.__file__).parent / "data" / "sample" / "train.jsonl"
    return MlcDPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=DPOConfig(
            output_dir=out,
            per_device_train_batch_size=2,
            learning_rate=2e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        ),
        train_dataset=dataset(sample, ["es", "fr", "sw"], bundles),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


if __name__ == "__main__":
    trainer = make_trainer(sys.argv[1], sys.argv[2], bundles=16, max_steps=8)
    trainer.train()
    trainer.drop_extractor()
    trainer.save_model(sys.argv[2])
