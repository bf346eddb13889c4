"""Embeddings on disk: what is read is what was written, a file is whole or absent, and another model's are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_flux import MAX_SEQUENCE_LENGTH, PROMPTS
from trainer.data.prompt_embeddings import (
    Embeddings,
    EmbeddingsError,
    EmbeddingsManifest,
    fingerprint,
    prepare,
    write_shard,
)
from trainer.data.prompt_files import LocatedPrompt
from trainer.data.prompt_lengths import describe_cut_prompts
from trainer.model.loading import ModelError, load_text_encoders
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning

MANIFEST = EmbeddingsManifest(text_encoders="5f2a", max_sequence_length=4, dtype="bfloat16")
CPU = torch.device("cpu")


def conditioning_of(prompts: tuple[str, ...]) -> Conditioning:
    """Of each prompt numbers of its own, the same in every call."""
    generators = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
    rows = [torch.randn(9, 3, generator=each).bfloat16() for each in generators]
    return Conditioning(torch.stack([row[:8] for row in rows]), torch.stack([row[8] for row in rows]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The first five prompts, in two shards."""
    folder = tmp_path / "embeddings"
    prepare(folder, MANIFEST)
    for prompts in (PROMPTS[:2], PROMPTS[2:5]):
        write_shard(folder, prompts, conditioning_of(prompts))
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    folder = tmp_path_factory.mktemp("embeddings")
    prepare(folder, MANIFEST)
    for start in range(0, len(PROMPTS), 3):
        write_shard(folder, PROMPTS[start : start + 3], conditioning_of(PROMPTS[start : start + 3]))
    return Embeddings.open(folder, MANIFEST)


@given(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=10))
def test_any_batch_is_read_as_it_was_written(many: Embeddings, prompts: list[str]) -> None:
    found, expected = many.read(prompts, CPU), conditioning_of(tuple(prompts))
    assert found.prompt_embeds.equal(expected.prompt_embeds)
    assert found.pooled.equal(expected.pooled)
    assert found.prompt_embeds.dtype == torch.bfloat16


def test_a_job_that_was_stopped_goes_on(folder: Path) -> None:
    """Whole shards are kept and their prompts not missing; the half of one that it was writing goes away."""
    kept, half = sorted(folder.glob("*.safetensors")), folder / "0123.safetensors.partial"
    half.write_bytes(kept[0].read_bytes()[:100])
    prepare(folder, MANIFEST)
    assert sorted(folder.glob("*.safetensors*")) == kept
    assert Embeddings.open(folder, MANIFEST).missing([*PROMPTS, PROMPTS[7]]) == list(PROMPTS[5:])


def test_missing_prompts_are_named_with_count_and_cure(folder: Path) -> None:
    embeddings = Embeddings.open(folder, MANIFEST)
    embeddings.require(PROMPTS[:5])
    with pytest.raises(
        EmbeddingsError, match=r"lacks 3 of the run's prompts, the first is 'full moon'.*srpo encode-prompts"
    ):
        embeddings.require(PROMPTS)
    with pytest.raises(EmbeddingsError, match="lacks 1 of"):
        embeddings.read(PROMPTS[4:6], CPU)


def test_embeddings_of_other_settings_are_refused(folder: Path) -> None:
    for name, other in (("text_encoders", "77"), ("max_sequence_length", 8), ("dtype", "float32")):
        changed = MANIFEST.model_copy(update={name: other})
        for use in (Embeddings.open, prepare):
            with pytest.raises(EmbeddingsError, match=rf"was made with {name} .*, the run has {other}"):
                use(folder, changed)


def test_a_folder_that_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbeddingsError, match=r"absent has no manifest\.json: run `srpo encode-prompts RUN\.yaml`"):
        Embeddings.open(tmp_path / "absent", MANIFEST)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(EmbeddingsError, match=rf"cannot read .*{shard.name} .*: delete it and run"):
        Embeddings.open(folder, MANIFEST)
    (folder / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(EmbeddingsError, match=r"cannot read .*manifest\.json"):
        Embeddings.open(folder, MANIFEST)
    (folder / "manifest.json").unlink()
    with pytest.raises(EmbeddingsError, match=r"has files but no manifest\.json"):
        prepare(folder, MANIFEST)


def test_a_fingerprint_tells_text_encoders_apart_and_not_where_they_lie(flux_folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(flux_folder, tmp_path / "moved"))
    assert fingerprint(moved) == fingerprint(flux_folder)
    (moved / "transformer" / "config.json").unlink()
    assert fingerprint(moved) == fingerprint(flux_folder)
    weights = moved / "text_encoder_2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(moved) != fingerprint(flux_folder)


def test_large_files_are_told_apart_by_parts(tmp_path: Path) -> None:
    file = tmp_path / "text_encoder_2" / "model.safetensors"
    file.parent.mkdir()
    with file.open("wb") as content:
        content.truncate((1 << 24) + 5)
    before = fingerprint(tmp_path)
    with file.open("r+b") as content:
        content.seek(-1, 2)
        content.write(b"1")
    assert fingerprint(tmp_path) != before


def test_text_encoders_alone_give_what_the_whole_model_gives(flux: Policy, flux_folder: Path) -> None:
    text = load_text_encoders(str(flux_folder), torch.float32)
    together = text.encode_prompts(PROMPTS, MAX_SEQUENCE_LENGTH)
    for index, prompt in enumerate(PROMPTS):  # in any batch, to the last bit
        alone = flux.encode_prompts([prompt], MAX_SEQUENCE_LENGTH)
        assert alone.prompt_embeds.equal(together[[index]].prompt_embeds)
        assert alone.pooled.equal(together[[index]].pooled)
    with pytest.raises(ModelError, match="no such folder"):
        load_text_encoders(str(flux_folder / "absent"), torch.float32)


def test_a_model_without_text_encoders_reads_none_and_still_saves_them(flux_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(flux_folder, tmp_path / "source"))
    weights = [source / name / "model.safetensors" for name in ("text_encoder", "text_encoder_2")]
    for file in weights:
        file.write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Policy.load(str(source), torch.float32)
    without = Policy.load(str(source), torch.float32, text_encoders=False)
    assert without.text.num_t5_tokens(PROMPTS[:1])
    without.save_pipeline(without.transformer, tmp_path / "saved")
    for file in weights:
        assert (tmp_path / "saved" / file.relative_to(source)).read_bytes() == b"not weights"


def test_prompts_that_the_encoders_cut_are_reported_with_count_limit_and_first_place(flux_folder: Path) -> None:
    text = load_text_encoders(str(flux_folder), torch.float32, only_tokenizers=True)
    (num_tokens,) = text.num_t5_tokens([PROMPTS[0]])
    prompts = [LocatedPrompt(prompt, f"train.txt, line {number}") for number, prompt in enumerate(PROMPTS[:2], 1)]
    assert describe_cut_prompts(text, prompts[:1], num_tokens) is None
    long, limit = LocatedPrompt(" ".join(PROMPTS * 9), "train.txt, line 3"), max(text.num_t5_tokens(PROMPTS[:2]))
    told = describe_cut_prompts(text, [*prompts, long, long], limit)
    assert told is not None
    assert told.startswith(f"2 of 4 prompts have more than {limit} T5 tokens (model.max_sequence_length)")
    assert "; 2 of 4 prompts have more than 77 CLIP tokens, and the pooled vector" in told
    assert told.count("the first is train.txt, line 3, ") == 2
