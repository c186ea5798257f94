"""Data sets of the hub, which a server on this machine plays: asked once for a commit, which is then what is read."""

import json
import os
import subprocess
import sys

import pytest

from mlc_ray.data.hub import HubName
from tests.data.hub_server import Hub, running

FIRST, SECOND = "a" * 40, "b" * 40
READ = """
import json, sys
from mlc_ray.config import SourceSection
from mlc_ray.data.bundles import BundleFileError
from mlc_ray.data.sources import pinned, resolve_source
from tests.data.files import read_file

for name in sys.argv[1:]:
    try:
        (source,) = pinned([SourceSection(path=name)])
        (file,) = resolve_source(source)
        prompts = [row.parsed.prompts["en"] for row in read_file(file)]
        print(json.dumps([file.path, file.fingerprint(), prompts]))
    except BundleFileError as error:
        print(json.dumps(str(error)))
"""


def line(text):
    return json.dumps({"prompts": {"en": text}, "kind": "benign", "chosen": "a", "rejected": "b"}).encode() + b"\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The hub, with a newest commit and an older one that is tagged; and the cache of a machine."""
    hub = Hub("owner/Pairs", {FIRST: line("one"), SECOND: line("two")}, {"main": SECOND, "v1": FIRST})
    with running(hub):
        yield hub, tmp_path_factory.mktemp("hub")


def read(place, *names, offline=False):
    """What a process says of each name: its commit, its fingerprint and its prompts, or an error."""
    hub, home = place
    ours = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", READ, *names], capture_output=True, text=True, env={**os.environ, **ours}, check=True
    )
    return [json.loads(text) for text in done.stdout.splitlines()]


def test_a_name_is_read_at_the_commit_that_it_stands_for(place):
    hub, _ = place
    newest, tagged, split, unknown, nothing = read(
        place, "owner/Pairs", "owner/Pairs#v1", f"owner/Pairs:train#{FIRST}", "owner/Pairs#v9", "owner/nothing"
    )
    assert (newest[0], newest[2]) == (f"owner/Pairs#{SECOND}", ["two"])
    assert (tagged[0], tagged[2]) == (f"owner/Pairs#{FIRST}", ["one"])
    assert (split[0], split[2]) == (f"owner/Pairs:train#{FIRST}", ["one"])
    assert newest[1] != tagged[1]
    assert unknown.startswith("'owner/Pairs#v9': 'owner/Pairs' has no branch, tag or commit 'v9'")
    assert nothing.startswith("'owner/nothing': it is not on this machine, and the hub has no data set")
    asked = [path for path in hub.asked if path.startswith("/api/datasets/owner/Pairs") and "tree" not in path]
    assert sum(path.endswith("/owner/Pairs") or path.endswith("/main") for path in asked) == 1
    assert sum(path.endswith("/revision/v1") for path in asked) == 1

    # Without the hub: what was cached last is of the first commit, and is not taken for another one.
    guessed, cached, other = read(place, "owner/Pairs", f"owner/Pairs#{FIRST}", f"owner/Pairs#{SECOND}", offline=True)
    assert (
        "the hub cannot be asked which commit that is" in guessed and "name its commit, owner/Pairs#COMMIT" in guessed
    )
    assert FIRST in guessed and SECOND in guessed
    assert cached == tagged
    assert "the hub could not be reached, and the copy of it here is of another commit" in other


def test_without_the_hub_the_only_commit_in_the_cache_is_read(place, tmp_path):
    here = place[0], tmp_path
    ((found),) = read(here, "owner/Pairs#v1")
    assert read(here, "owner/Pairs", offline=True) == [found]
    (missing,) = read((place[0], tmp_path / "empty"), "owner/Pairs", offline=True)
    assert missing.endswith("name its commit, owner/Pairs#COMMIT")


@pytest.mark.parametrize(
    "text", ["owner/name", "name", "owner/name@en:test", "owner/name:test#v1.0", "owner/name@en#refs/pr/1"]
)
def test_a_name_is_the_text_of_its_parts(text):
    assert str(HubName.parse(text)) == text


@pytest.mark.parametrize("text", ["/data/name", "./name/of/folder", "a b", "owner/name#", "s3://bucket/x"])
def test_what_is_no_name_of_the_hub(text):
    assert HubName.parse(text) is None
