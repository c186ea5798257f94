"""A reader of your own: one class in one file, outside the package. It turns records of your format into bundles.

    data:
      train:
        - path: questions.jsonl        # or .json, .csv, .parquet, a saved dataset, a name on the hub
          format: examples.my_reader:Questions

It works for benchmarks too: `--benchmark questions.jsonl,format=examples.my_reader:Questions`. Run from the folder that
holds `examples`, or with it on PYTHONPATH; on a cluster, send the folder along with `ray job submit --working-dir`. A
package of yours can announce a short name instead, as an entry point of the group `mlc_ray.format`: `format: auto` then
recognises the files. Data that are in memory need no reader: see `mlc_ray.data.given`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray.data.bundles import BundleError
from mlc_ray.data.formats.base import Format


class Questions(Format):
    """`{"question": {"en": ..., "de": ...}, "rating": 1 to 5, "answer": ..., "refusal": ...}`.

    Raters gave 1 to questions that anybody may ask and 5 to those that nobody should help with: from 3 on a question
    is harmful, and refusing it is the better answer.
    """

    needs = frozenset({"question", "rating"})  # a file without these is refused, with their names
    keys = needs | {"id", "answer", "refusal"}  # a record with another key is rejected: it may be a misspelt one
    ids = ("id",)  # no two records may share one

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a bundle; whether they are valid (languages, texts, answers) is checked for every format."""
        rating = record["rating"]
        if rating not in (1, 2, 3, 4, 5):
            raise BundleError(f"rating {rating!r} is not a whole number from 1 to 5")
        harmful = rating >= 3
        answers = (record.get("answer"), record.get("refusal"))
        chosen, rejected = reversed(answers) if harmful else answers
        return {
            "prompts": record["question"],
            "kind": "harmful" if harmful else "benign",
            "chosen": chosen,
            "rejected": rejected,
            "source": "questions",
        }
