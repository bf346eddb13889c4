"""The verbs `score` and `rank-words` against the real app: output, error messages and exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.types import ASGIApp

from deploy.settings import free_port
from reward_server.http.limits import Limits
from reward_server.models import ClipArgs, TwoTower, load_reward
from reward_server.scoring.srp import similarity
from services.clients.reward import RewardClient
from services.commands.main import main
from services.commands.rank_words import draw, measure, texts_per_request
from services.commands.word_effects import MIN_IMAGES, meaningless_words
from services.contract import PromptPair, RewardRequest, WeightedReward
from services.pictures import read_picture
from tests.contract.clients.test_reward import FailsFirst, status
from tests.serving import serve_app
from tests.tiny_flux import PROMPTS, make_tiny_flux
from trainer.jobs.sample import main as sample

PAIR = ("--prompt", "cat", "--positive", "3D", "--negative", "Flat")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write files of different formats and sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = []
    for index in range(MIN_IMAGES):
        pixels = rng.integers(0, 256, (24 + index, 40 - index, 3), np.uint8)
        file = folder / f"{index}.{('png', 'jpg', 'webp')[index % 3]}"
        Image.fromarray(pixels).save(file)
        files.append(str(file))
    return files


def rewards_of(pictures: list[str], reward_url: str) -> list[float]:
    with RewardClient(reward_url) as client:
        pair, tiny = PromptPair("cat", "3D", "Flat"), WeightedReward("tiny-clip")
        images = [read_picture(Path(file)) for file in pictures]
        requests = [RewardRequest((image,), (pair,), (0.0,), (tiny,), with_gradient=False) for image in images]
        return [float(client.score(each).rewards[0]) for each in requests]


def test_score_prints_a_row_for_each_file_in_their_order(
    pictures: list[str], reward_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", *pictures, *PAIR, "--url", reward_url]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[3] for row in rows] == pictures
    np.testing.assert_allclose([float(row.split()[0]) for row in rows], rewards_of(pictures, reward_url), atol=6e-5)


def test_score_reads_names_from_stdin_and_writes_json(
    pictures: list[str], reward_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(pictures[1:]) + "\n"))
    assert main(["score", pictures[0], "-", *PAIR, "--json", "--url", reward_url]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == pictures
    np.testing.assert_allclose([line["reward"] for line in lines], rewards_of(pictures, reward_url), atol=1e-6)
    for line in lines:
        assert line["reward"] == pytest.approx(line["positive_similarity"] - line["negative_similarity"], abs=1e-6)
        assert line["scorer"].startswith("tiny-clip@sha256:")
    assert len({line["request_id"] for line in lines}) == len(lines)


def test_score_names_every_file_that_fails_and_goes_on(
    pictures: list[str], reward_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, absent, large = tmp_path / "broken.png", tmp_path / "absent.png", tmp_path / "large.png"
    broken.write_bytes(Path(pictures[0]).read_bytes()[:-40])
    Image.new("RGB", (200, 200)).save(large)  # more than the service of these tests allows
    files = [pictures[0], str(broken), str(absent), str(large), pictures[1]]
    assert main(["score", *files, *PAIR, "--json", "--url", reward_url]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["image"] for line in printed.out.splitlines()] == pictures[:2]
    for line, file, cause in zip(
        printed.err.splitlines(), (broken, absent, large), ("damaged", "No such file", "200 x 200"), strict=True
    ):
        assert line.startswith(f"srpo score: {file}: ")
        assert cause in line


@pytest.mark.parametrize(
    ("changed", "cause"),
    [(("--positive", ""), "positive"), (("--reward", "beauty"), "'beauty' is not served here; served: tiny-clip")],
)
def test_score_names_a_mistake(
    pictures: list[str], reward_url: str, changed: tuple[str, ...], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", pictures[0], *PAIR, *changed, "--url", reward_url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert cause in line


def test_a_service_that_is_gone_is_named_once(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["score", *pictures, *PAIR, "--reward", "tiny-clip", "--url", url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert url in line
    assert "make up" in line


def test_once_a_service_has_answered_it_is_waited_for(
    pictures: list[str], app: ASGIApp, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed replica may come back later; only the first request is limited to two attempts."""
    with serve_app(FailsFirst(app, [app, status(500), status(500)])) as url:
        assert main(["score", pictures[0], *PAIR, "--url", url]) == 0
    assert pictures[0] in capsys.readouterr().out


def test_rank_words_prints_every_word_with_a_verdict(
    pictures: list[str], reward_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.txt").write_text("Oil painting\n\nFlat\n", encoding="utf-8")
    words = ("--words", "3D", "Flat", "--words-file", str(tmp_path / "words.txt"))
    assert main(["rank-words", *pictures, "--prompt", "cat", *words, "--url", reward_url]) == 0
    table = capsys.readouterr().out
    for word in ("3D", "Flat", "Oil painting"):
        assert sum(line.startswith(f"{word} ") for line in table.splitlines()) == 1
    assert main(["rank-words", *pictures, "--prompt", "cat", *words, "--pairs", "--json", "--url", reward_url]) == 0
    pairs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({frozenset((pair["positive"], pair["negative"])) for pair in pairs}) == len(pairs) == 3
    against = ("--negative", "Photo", "--json", "--url", reward_url)
    assert main(["rank-words", *pictures, "--prompt", "cat", *words, *against]) == 0
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(finding["positive"], finding["negative"]) for finding in findings} == {
        (word, "Photo") for word in ("3D", "Flat", "Oil painting")
    }


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--prompt", "cat"), "no control words"),
        (("--words", "3D"), "--prompt TEXT"),
        (("--prompts", "PROMPTS", "--words", "3D"), f"{MIN_IMAGES} images and 1 lines"),
        (("--prompts", "absent.txt", "--words", "3D"), "absent.txt"),
        (("--prompt", "cat", "--words", "3D", "--model", "flux"), "--prompts FILE"),
    ],
)
def test_rank_words_names_a_mistake(
    pictures: list[str],
    reward_url: str,
    tmp_path: Path,
    arguments: tuple[str, ...],
    cause: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.txt").write_text("cat\n", encoding="utf-8")
    given = [str(tmp_path / "prompts.txt") if argument == "PROMPTS" else argument for argument in arguments]
    assert main(["rank-words", *pictures, *given, "--url", reward_url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert cause in line


def test_rank_words_wants_enough_pictures(
    pictures: list[str], reward_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank-words", pictures[0], "--prompt", "cat", "--words", "3D", "--url", reward_url]) == 1
    assert f"at least {MIN_IMAGES}" in capsys.readouterr().err


@pytest.mark.slow
def test_rank_words_draws_with_a_model_what_it_is_to_look_at(
    reward_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, prompts = make_tiny_flux(tmp_path / "flux"), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    drawn = ("--model", str(model), "--prompts", str(prompts), "--num-images", str(MIN_IMAGES))
    assert main(["rank-words", *drawn, "--words", "3D", "Flat", "--url", reward_url]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == f"tiny-clip on {MIN_IMAGES} pictures"
    assert {row.split()[0] for row in rows[:2]} == {"3D", "Flat"}


@pytest.mark.slow
def test_what_is_drawn_is_what_srpo_sample_draws(tmp_path: Path) -> None:
    model = str(make_tiny_flux(tmp_path / "flux"))
    for index, picture in enumerate(draw(model, PROMPTS[:2])):
        options = [option for prompt in PROMPTS[: index + 1] for option in ("--prompt", prompt)]
        assert sample([model, *options, "-o", str(tmp_path / "strip.png")]) == 0
        last = np.split(read_picture(tmp_path / "strip.png"), index + 1, axis=2)[-1]
        np.testing.assert_allclose(picture.astype(int), last, atol=2)  # batches of two sizes round differently


@pytest.mark.parametrize(
    ("size_px", "num_texts"), [((24, 40), 8), ((1024, 1024), 8), ((2900, 2900), 1), ((4096, 4096), 1)]
)
def test_the_copies_of_a_picture_fit_into_a_request(size_px: tuple[int, int], num_texts: int) -> None:
    assert texts_per_request(*size_px) == num_texts
    Limits().check_images([size_px] * num_texts)


def test_what_is_measured_is_what_autograd_finds(pictures: list[str], reward_url: str, clip: ClipArgs) -> None:
    """Compare similarities, and inner products of gradients minus that of the last text."""
    images = [read_picture(Path(file)) for file in pictures[:2]]
    prompts, words = ("cat", "dog"), ("3D", "Flat")
    with RewardClient(reward_url) as client:
        measured = measure(client, "tiny-clip", images, prompts, words)
    model = load_reward(clip)
    assert isinstance(model, TwoTower)
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        pixels = (torch.from_numpy(image) / 255)[None].requires_grad_()
        texts = model.embed_text([f"{word}. {prompt}" for word in (*words, *meaningless_words())])
        similarities = similarity(model.embed_image(pixels), texts)
        gradients = torch.stack(
            [torch.autograd.grad(value, pixels, retain_graph=True)[0].flatten() for value in similarities]
        )
        gradients = gradients - gradients[-1]
        np.testing.assert_allclose(measured.similarities[index], similarities.detach(), atol=1e-6)
        np.testing.assert_allclose(measured.gram[index], gradients @ gradients.T, atol=1e-7)
        assert measured.gram[index].max() > 1e-4
