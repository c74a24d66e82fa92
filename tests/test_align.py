"""Alignment of a language model with an encoder: conversations, packing, small transformers architectures, exact resume."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from conftest import encode, make_frames
from harness import slow
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jepa_core.config import ClipConfig, EncoderConfig, ProjectorConfig
from jepa_core.encoder import VisionTransformer
from jepa_core.optimization import make_optimizer
from jepa_core.positions import Grid
from jepa_core.projector import Projector, pooled, visual_tokens
from jepa_core.weights import ENCODER, ModelConfig
from pipelines import (
    align,
    align_data,
    align_media,
    align_prepare,
    catalog,
    causal_model,
    chat,
    conversations,
    language_model,
    model_folder,
    post_train,
    reasons,
    run_folder,
    storage,
    units,
)
from pipelines.align_config import AlignConfig
from pipelines.catalog_schema import VIDEO_SCHEMA, VIDEOS, CatalogRef, item_id
from pipelines.chat import IGNORED, TEXT, Chat
from pipelines.errors import InputRefused, UsageError
from pipelines.ingest_tasks import Job, probe_items
from pipelines.language_model import Prompt, load_video_language_model
from pipelines.presets import load
from pipelines.train_state import Saver, TrainState

pytestmark = pytest.mark.vidqa
SMALL = EncoderConfig(dim=24, depth=1, heads=2, patch_size=8)
CLIP = ClipConfig(num_frames=4, fps=8.0, crop_size=16)
GRIDS = (Grid(1, 2, 2), Grid(2, 2, 2))
WORDS = ["Which way does the 7 move ? left right up down What is it a cat sat on mat yes no one two three"]
QUESTION = [("user", "<video>\nWhich way does the 7 move?")]


def options_of(folder: Path | str, *words: str) -> AlignConfig:
    given = [f"run.dir={folder}", "encoder=e", "catalog=c", "conversations.a.uri=u", "train.steps=4", "train.batch_size=4"]
    built = "language_model.built_in={dim: 32, depth: 2, heads: 2, hidden: 48}"
    small = ["language_model.max_length=64", built, "train.precision=fp32", "train.log_every=1", "optim.warmup_steps=1"]
    return load(AlignConfig, "align", [*given, *small, "optim.lr=1e-2", "train.microbatches=1", *words])


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Chat:
    """The built-in tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    causal_model.prepare(options_of(folder).language_model, WORDS, 0, str(folder))
    return causal_model.open_chat(str(folder))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A folder as users have them: a random Llama saved by transformers, its tokenizer without pad token or template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("llama") / "tiny-llama")
    tokenizer = chat.word_tokenizer(WORDS, 100)
    tokenizer.pad_token = tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# Projector


def test_the_projector_pools_boxes_of_the_grid_or_by_queries():
    torch.manual_seed(0)
    grid = Grid(3, 2, 4)
    tokens = torch.randn(2, grid.num_tokens, 24)
    found = pooled(tokens, grid, (2, 2, 3))
    boxes = tokens.reshape(2, 3, 2, 4, 24)
    torch.testing.assert_close(found[:, 0], boxes[:, :2, :, :3].mean((1, 2, 3)))
    torch.testing.assert_close(found[:, 3], boxes[:, 2:, :, 3:].mean((1, 2, 3)), msg="what is left at the edges")
    for config, count in ((ProjectorConfig(pool=(2, 2, 3)), 4), (ProjectorConfig("attentive", budget=5, heads=2, depth=2), 5)):
        projector = Projector(config, 24, 32)
        assert projector(tokens, grid).shape == (2, count, 32)
        assert visual_tokens(config, grid) == count
        assert visual_tokens(config, Grid(1, 2, 4)) in (2, 5)
        assert projector(tokens[:, :8], Grid(1, 2, 4)).shape[1] == visual_tokens(config, Grid(1, 2, 4))
    with pytest.raises(ValueError, match="do not fill"):
        projector(tokens[:, 1:], grid)


# Conversations


KNOWN = [("v1", "/data/clips/one.mp4"), ("v2", "/data/clips/two.mp4"), ("i1", "/data/pictures/cat.png")]


@pytest.fixture
def videos(monkeypatch):
    rows = [{"id": key, "uri": uri, "member": "", "digest": key, "content_digest": key} for key, uri in KNOWN]
    monkeypatch.setattr(catalog, "read_videos", lambda ref, columns: pa.Table.from_pylist(rows))


def read(tmp_path: Path, *trees) -> tuple[list[dict], list[dict]]:
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(tree if isinstance(tree, str) else json.dumps(tree) for tree in trees))
    table, refused = conversations.read(str(path), CatalogRef("/c", 1))
    return table.to_pylist(), refused


def said(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]


def test_forms_in_which_conversations_come(videos, tmp_path):
    parts = [{"type": "video", "video": "one.mp4"}, {"type": "text", "text": "what?"}]
    rows, refused = read(
        tmp_path,
        {"id": "a", "video": "clips/one.mp4", "conversations": said("<video>\nwhat?", "a cat", "why?", "so")},
        {"image": ["cat.png"], "video": "two.mp4", "conversations": said("<video> or <image>?", "two")},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts},
                      {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]},
        {"id": 9, "conversations": said("no medium?", "none")},
    )  # fmt: skip
    assert refused == []
    assert [row["id"] for row in rows] == ["a", "2", "3", "9"]
    assert [row["videos"] for row in rows] == [["v1"], ["v2", "i1"], ["v1"], []], "in the order of the placeholders"
    assert rows[1]["kinds"] == ["video", "image"]
    assert [turn["role"] for turn in rows[2]["turns"]] == ["system", "user", "assistant"]
    assert rows[2]["turns"][1]["text"] == "<video>\nwhat?"
    assert not any(row["repairs"] for row in rows)
    (tmp_path / "whole.json").write_text(json.dumps([{"video": "one", "conversations": said("<video>?", "yes")}]))
    assert conversations.read(str(tmp_path / "whole.json"), CatalogRef("/c", 1))[0]["videos"].to_pylist() == [["v1"]]


def test_what_is_repaired_is_counted(videos, tmp_path):
    rows, refused = read(
        tmp_path,
        {"video": "one.mp4", "image": "cat.png", "conversations": said("what?", "a cat")},
        {"video": "one.mp4", "conversations": said("<image>\nwhat?", "a cat")},
        {"video": "one.mp4", "conversations": said("<video>\nwhat?", "a cat", "and?")},
        {"video": "one.mp4", "conversations": said("<video>\nwhat?", "a cat", "and?", " ", "why?", "so")},
    )
    assert refused == []
    assert rows[0]["turns"][0]["text"] == "<image>\n<video>\nwhat?"
    assert rows[1]["turns"][0]["text"] == "<video>\nwhat?"
    assert [row["repairs"] for row in rows] == [
        [conversations.PLACEHOLDER_ADDED], [conversations.PLACEHOLDER_RENAMED], *[[conversations.QUESTION_DROPPED]] * 2
    ]  # fmt: skip
    assert [turn["text"] for turn in rows[3]["turns"]] == ["<video>\nwhat?", "a cat", "why?", "so"]
    assert set(conversations.REPAIRS) == {repair for row in rows for repair in row["repairs"]}


BAD = {
    '{"id": "cut", "conv': reasons.BAD_JSON,
    "[1, 2]x": reasons.BAD_JSON,
    '"text"': reasons.BAD_JSON,
    '{"conversations": "hello"}': reasons.BAD_TURNS,
    '{"conversations": [{"from": "bot", "value": "hi"}]}': reasons.BAD_TURNS,
    '{"conversations": [{"from": "human", "value": 3}]}': reasons.BAD_TURNS,
    '{"video": {"a": 1}, "conversations": []}': reasons.BAD_TURNS,
    '{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}': reasons.BAD_TURNS,
    json.dumps({"video": "one.mp4", "conversations": said("<video> what?")}): reasons.NO_ANSWER,
    json.dumps({"video": "one.mp4", "conversations": said("<video> what?", "  ")}): reasons.NO_ANSWER,
    json.dumps({"video": "one.mp4", "conversations": said("<vid> what?", "it")}): reasons.UNKNOWN_PLACEHOLDER,
    json.dumps({"video": "one.mp4", "conversations": said("<|image_1|> what?", "it")}): reasons.UNKNOWN_PLACEHOLDER,
    json.dumps({"video": "one.mp4", "conversations": said("<video><video> what?", "it")}): reasons.PLACEHOLDER_MISMATCH,
    json.dumps({"conversations": said("<video> what?", "it")}): reasons.PLACEHOLDER_MISMATCH,
    json.dumps({"video": "one.mp4", "conversations": said("what?", "<video>")}): reasons.PLACEHOLDER_MISMATCH,
    json.dumps({"video": "nine.mp4", "conversations": said("<video> what?", "it")}): reasons.MISSING_MEDIA,
}


def test_every_bad_line_is_a_row_with_its_reason(videos, tmp_path):
    good = {"video": "one.mp4", "conversations": said("<video>?", "yes")}
    lines = [good]
    rows, refused = read(tmp_path, *lines, *BAD)
    assert [row["line"] for row in rows] == [1]
    assert [(row["line"], row["reason"]) for row in refused] == list(enumerate(BAD.values(), 2))
    assert all(row["detail"] for row in refused)
    assert {row["reason"] for row in refused} <= set(reasons.CONVERSATION_REASONS)
    with pytest.raises(InputRefused, match="holds no conversation"):
        read(tmp_path, "")
    page = (Path(__file__).parent.parent / "docs" / "align.md").read_text()
    assert all(f"`{name}`" in page for name in (*reasons.CONVERSATION_REASONS, *conversations.REPAIRS))


# Templates and the mask of the loss


def test_only_answers_and_their_ends_are_learned(words):
    turns = [("system", "one two"), *QUESTION, ("assistant", "left up"), ("user", "yes?"), ("assistant", "no")]
    one = words.encode(turns, [3])
    names = words.tokenizer.convert_ids_to_tokens(one.ids.tolist())
    learned = [name for name, answer in zip(names, one.answer, strict=True) if answer]
    assert learned == ["left", "up", "<eos>", "no", "<eos>"]
    assert one.visual[one.visual != TEXT].tolist() == [0, 1, 2]
    assert names[: names.index("<pad>")] == ["<bos>", "system", ":", "one", "two", "user", ":"]
    asked = words.encode(turns[:-1], [3])
    assert one.ids.tolist()[: len(asked.ids)] == asked.ids.tolist(), "a question is read as it was learned"
    assert not asked.answer[-3:].any()
    packed = chat.pack([one], [np.arange(3)], 64)
    where = packed.target[0] != IGNORED
    assert packed.target[0][where].tolist() == one.ids[one.answer].tolist()
    assert (np.flatnonzero(where) + 1).tolist() == np.flatnonzero(one.answer).tolist(), "the token before says it"


def test_templates_of_others(words):
    tokenizer = chat.word_tokenizer([*WORDS, "im_start im_end"], 100)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = Chat(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found.stops == {end, tokenizer.eos_token_id}
    one = found.encode([*QUESTION, ("assistant", "left")], [2])
    assert one.ids[one.answer].tolist() == [*tokenizer("left", add_special_tokens=False)["input_ids"], end]
    assert found.decode([*one.ids[one.answer].tolist(), 5, 6]) == "left"
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + chat.TEMPLATE
    )
    with pytest.raises(chat.TemplateRefused, match="no system"):
        Chat(tokenizer).encode([("system", "a"), *QUESTION, ("assistant", "b")], [2])
    tokenizer.chat_template = "{{ messages | length }}" + chat.TEMPLATE
    with pytest.raises(chat.TemplateRefused, match="rewrites"):
        Chat(tokenizer).encode([*QUESTION, ("assistant", "b")], [2])


def test_a_tokenizer_is_repaired_or_refused(llama):
    tokenizer = causal_model.open_tokenizer(llama)
    assert tokenizer.pad_token is None
    found = Chat(tokenizer)
    assert set(found.repairs) == {"pad_token", "chat_template"}
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(InputRefused, match="end-of-text"):
        Chat(tokenizer)


# Packing


def architectures():
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    yield LlamaConfig(**sizes, num_key_value_heads=2)
    yield Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=True)
    yield GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def module_of(architecture, *words: str) -> language_model.VideoLanguageModel:
    torch.manual_seed(0)
    lm = causal_model._empty(architecture, torch.float32)
    return language_model.VideoLanguageModel(lm, options_of("r", *words).projector, SMALL, GRIDS)


def losses_of(model, encoded, videos) -> list[float]:
    places = [np.arange(8) + 8 * number for number in range(len(encoded))]
    rows = torch.from_numpy(np.stack(chat.pack(encoded, places, 64))).long()
    loss, numbers = model(rows, (torch.empty(0, 4, 24), videos), len(encoded), True)
    loss.backward()
    return numbers["sample_loss"].tolist()


@pytest.mark.parametrize("place", range(3), ids=["llama", "qwen2", "gpt2"])
def test_packed_conversations_do_not_see_each_other(words, place):
    torch.manual_seed(1)
    model = module_of(list(architectures())[place])
    texts = [("left", "up right"), ("a cat sat on a mat", "no"), ("yes", "one two three")]
    encoded = [words.encode([*QUESTION, ("assistant", first), ("user", "What?"), ("assistant", second)], [8])
               for first, second in texts]  # fmt: skip
    videos = torch.randn(3, 8, 24)
    packed = chat.pack(encoded, [np.arange(8)] * 3, 64)
    assert packed.ids.shape[0] == 2, "two of them share a row"
    together = losses_of(model, encoded, videos)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    alone = [losses_of(model, [one], videos[number : number + 1])[0] for number, one in enumerate(encoded)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    assert len({round(loss, 4) for loss in alone}) == 3
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_gradient_checkpointing_and_text_alone(words, llama, tmp_path):
    found = {}
    for checkpointing in ("false", "true"):
        folder = str(tmp_path / checkpointing)
        config = options_of(folder, f"language_model.source={llama}", f"language_model.gradient_checkpointing={checkpointing}")
        causal_model.prepare(config.language_model, (), 0, folder)
        model = language_model.build(config, SMALL, CLIP, None, train=True).train()
        one = causal_model.open_chat(folder).encode([("user", "What?"), ("assistant", "a cat")])
        rows = torch.from_numpy(np.stack(chat.pack([one], [np.empty(0, np.int64)], 64))).long()
        loss, _ = model(rows, (torch.empty(0, 4, 24), torch.empty(0, 8, 24)), 1, True)
        loss.backward()
        found[checkpointing] = loss.item(), [p.grad.norm().item() for p in model.parameters()]
        assert model.projector.fc1.weight.grad.abs().sum() == 0, "it runs on nothing, for the workers that have something"
    assert found["false"][0] == pytest.approx(found["true"][0])
    assert found["false"][1] == pytest.approx(found["true"][1], rel=1e-4, abs=1e-6)


# Media and units


def test_frames_are_spread_over_the_whole_video():
    pts = np.arange(10) * 512
    assert align_media.spread(pts, 1 / 12800, 10).tolist() == pts.tolist()
    assert align_media.spread(pts, 1 / 12800, 4).tolist() == [0, 1536, 3072, 4608]
    assert align_media.spread(pts, 1 / 12800, 1).tolist() == [2048]
    assert align_media.spread(pts[:2], 1 / 12800, 4).tolist() == [0, 0, 0, 512]
    assert align_media.spread(pts, 1 / 12800, 2, 0.08, 0.2).tolist() == [1024, 2560]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("model") / "m")
    torch.manual_seed(5)
    parts = {ENCODER: VisionTransformer(SMALL).state_dict()}
    clip = model_folder.ClipFormat(4, 16, 8.0)
    model_folder.write(model_folder.ModelFolder(ModelConfig(encoder=SMALL), parts, clip=clip), uri)
    return uri


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> str:
    """A catalog of three videos and a picture, by the task of an ingest in this process."""
    root = tmp_path_factory.mktemp("media")
    for index in range(3):
        (root / f"v{index}.mp4").write_bytes(encode(make_frames(12, 32, 32, seed=index)))
    Image.fromarray(make_frames(1, 32, 32, seed=7)[0]).save(root / "p.png")
    ref, items = CatalogRef(str(root / "catalog"), None), []
    for info in storage.list_files(str(root), (".mp4", ".png")):
        place = {"uri": info.uri, "member": "", "offset": 0, "size": info.size, "etag": info.etag}
        items.append({"id": item_id(*place.values()), **place, "label": None, "cuts": None})
    rows = probe_items(pa.Table.from_pylist(items), Job(ref.uri, str(root), "one", "none"))
    assert rows["reason"].null_count == 4, rows["detail"]
    catalog.Writer(ref, "one").append(VIDEOS, rows.select(VIDEO_SCHEMA.names).cast(VIDEO_SCHEMA))
    return ref.uri


@pytest.fixture
def alone(monkeypatch):
    """Tables stay in this process."""
    monkeypatch.setattr(ray, "put", lambda value: value)


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("lists") / "list.jsonl"
    trees = [
        {"video": f"v{n % 3}.mp4", "conversations": said(f"<video>\nWhich way does the {n} move?", "left up")} for n in range(6)
    ]
    trees += [
        {"image": "p.png", "conversations": said("What is it?", "a cat")},
        {"image": "p.png", "video": "v1.mp4", "conversations": said("<video> <image>\nyes?", "no")},
        {"conversations": said("one two?", "three")},
        {"video": "gone.mp4", "conversations": said("<video>?", "no")},
        {"video": "v0.mp4", "conversations": said("<video>" + " cat" * 80, "no")},
    ]
    path.write_text("\n".join(json.dumps(tree) for tree in trees))
    return str(path)


def aligned(folder: Path, encoder: str, media: str, lists: str, *words: str) -> AlignConfig:
    given = [f"encoder={encoder}", f"catalog={media}", f"conversations.a.uri={lists}", "max_refused=0.5", "train.num_workers=0"]
    return options_of(folder, *given, *words)


def trained(reporter, *arguments: str) -> list[dict]:
    config = aligned(*arguments)
    align.run(config, reporter)
    return run_folder.read_parts(config.run.dir, run_folder.METRICS)


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_llama_folder_with_adapters_end_to_end_and_resumed_to_the_bit(
    encoder, media, lists, llama, ray_session, reporter, tmp_path
):
    words = [f"language_model.source={llama}", "language_model.lora={rank: 4, dropout: 0.2}", "conversations.b.weight=0.5",
             f"conversations.b.uri={lists}", "language_model.gradient_checkpointing=true"]  # fmt: skip
    straight = trained(reporter, tmp_path / "straight", encoder, media, lists, *words)
    halves = tmp_path / "halves"
    trained(reporter, halves, encoder, media, lists, *words, "train.stop_at=2")
    resumed = trained(reporter, halves, encoder, media, lists, *words)
    timed = ("loss", "grad_norm", "loss_other_video", "token_accuracy", "rank_me", "loss/a", "loss/b")
    assert [[line.get(key) for key in timed] for line in resumed] == [[line.get(key) for key in timed] for line in straight]
    assert len(straight) == 4
    assert {"loss/a", "loss/b"} <= {key for line in straight for key in line}
    ends = [run_folder.require_checkpoint(str(folder)) for folder in (tmp_path / "straight", halves)]
    for stem in ("projector", "lm"):
        one, two = (run_folder.load_weights(end, stem) for end in ends)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(causal_model.LORA in name for name in one), "what is frozen is in no checkpoint"
    result = run_folder.read_json(str(halves), run_folder.RESULT)["data"]
    assert result["conversations"] == {"a": 9, "b": 9}
    assert result["refused"] == {reasons.MISSING_MEDIA: 2, reasons.TOO_LONG: 2}
    assert result["repairs"] == {conversations.PLACEHOLDER_ADDED: 2}
    assert set(result["tokenizer_repairs"]) == {"pad_token", "chat_template"}
    told = [json.loads(line) for line in storage.read_bytes(f"{halves}/refused/a.jsonl").decode().splitlines()]
    assert [(row["line"], row["reason"]) for row in told] == [(10, reasons.MISSING_MEDIA), (11, reasons.TOO_LONG)]

    answerer = load_video_language_model(str(halves))
    pixels = torch.randint(0, 255, (1, 8, 2 * 8 * 8 * 3), dtype=torch.uint8)
    visual = answerer.encode(pixels)
    assert visual.shape == (1, 8, 32)
    seen, blind = Prompt(QUESTION, visual[0]), Prompt(QUESTION, None)
    scores = answerer.score([seen, blind], [["left up", "a cat"], ["left up", "a cat"]])
    assert scores[0].total != scores[1].total
    assert load_video_language_model(ends[1].uri).score([seen], [["left up", "a cat"]])[0] == scores[0]
    assert len(answerer.generate([seen, blind], 3)) == 2
    Path(llama, "more.txt").write_text("x")
    with pytest.raises(InputRefused, match="is not the folder that"):
        load_video_language_model(str(halves))
    Path(llama, "more.txt").unlink()


@slow
@pytest.mark.ray
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("features", ["cached", "online"])
def test_two_workers_learn_what_one_process_does(
    encoder, media, lists, llama, ray_session, reporter, tmp_path, parallel, features
):
    """Adapters on weights that stay frozen, and then all weights; the checkpoint continues in one process."""
    for name, words in (("adapters", ["language_model.lora={rank: 4, dropout: 0.0}"]), ("all", ["train_parts=all"])):
        if name == "all" and features == "cached":
            continue  # nothing to cache where the encoder learns
        words = [
            f"language_model.source={llama}",
            "train.microbatches=2",
            *words,
            *([f"features={features}"] if name != "all" else []),
        ]
        alone = trained(reporter, tmp_path / name / "alone", encoder, media, lists, *words)
        folder = tmp_path / name / "two"
        both = trained(reporter, folder, encoder, media, lists, *words, "train.num_workers=2", f"train.parallel={parallel}")
        for one, two in zip(alone, both, strict=True):
            told = ("step", "loss", "grad_norm", "lr")
            assert [two[key] for key in told] == pytest.approx([one[key] for key in told], rel=1e-3)
        more = trained(reporter, folder, encoder, media, lists, *words, "train.steps=5")
        assert [line["step"] for line in more] == [1, 2, 3, 4, 5]


def test_a_start_with_other_options_prepares_again(encoder, media, lists, reporter, monkeypatch, tmp_path):
    """Until there is a checkpoint, options may change: nothing that the first start prepared is trained on."""
    monkeypatch.setattr(align, "_fit", lambda *given: None)
    monkeypatch.setattr(align.ray_session, "session", lambda options: contextlib.nullcontext())
    prepared(tmp_path / "run", encoder, media, lists, reporter, "features=online")
    first = storage.read_bytes(f"{tmp_path}/run/{align_prepare.MEDIA}")
    for name in ("run", "fresh"):
        align.run(aligned(tmp_path / name, encoder, media, lists, "features=online", "num_frames=2"), reporter)
    again, fresh = (storage.read_bytes(f"{tmp_path}/{name}/{align_prepare.MEDIA}") for name in ("run", "fresh"))
    assert again == fresh != first


def test_stages_and_a_trained_encoder(encoder, media, lists, reporter, alone, tmp_path):
    """Without the loop: what each stage holds, takes over and leaves."""
    first = prepared(tmp_path / "one", encoder, media, lists, reporter, "train_parts=projector", "features=online")
    task = stepped(first)
    assert {name.split(".")[0] for name, p in task.module.named_parameters() if p.requires_grad} == {"projector"}
    second = prepared(tmp_path / "two", encoder, media, lists, reporter, f"init={first.run.dir}", "train_parts=all")
    later = align.AlignTask(second, torch.device("cpu"))
    later.begin(None)
    same = zip(task.module.projector.parameters(), later.module.projector.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in same)
    same = zip(task.module.lm.parameters(), later.module.lm.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in same)
    later = stepped(second)
    assert later.exports == ("projector", "lm", "encoder")
    assert later.module.encoder.blocks[0].mlp.fc1.weight.grad is None
    third = prepared(tmp_path / "three", encoder, media, lists, reporter, f"init={second.run.dir}", "features=online",
                     "language_model.lora.rank=2")  # fmt: skip
    last = align.AlignTask(third, torch.device("cpu"))
    kept, _ = post_train.load_frozen_encoder(third.run.dir)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), later.module.encoder.parameters(), strict=True))
    full = dict(later.module.lm.named_parameters())
    adapted = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in last.module.lm.named_parameters()
    }
    assert all(torch.equal(full[name], adapted[name]) for name in full)
    stepped(third)
    with pytest.raises(InputRefused, match="starts from adapters"):
        config = prepared(tmp_path / "four", encoder, media, lists, reporter, f"init={third.run.dir}", "features=online")
        align.AlignTask(config, torch.device("cpu"))
    control = prepared(tmp_path / "r", f"random:{encoder}", media, lists, reporter, "features=online")
    drawn, _ = post_train.load_frozen_encoder(control.run.dir)
    assert not torch.equal(
        drawn.blocks[0].mlp.fc1.weight, post_train.load_frozen_encoder(first.run.dir)[0].blocks[0].mlp.fc1.weight
    )


def prepared(folder: Path, encoder: str, media: str, lists: str, reporter, *words: str) -> AlignConfig:
    config = align._resolved(aligned(folder, encoder, media, lists, *words))
    run_folder.begin(config.run, config)
    align._prepare(config, reporter)
    return config


def data_of(config: AlignConfig) -> align_data.AlignData:
    source = post_train.frozen_config(config.run.dir)
    clip = config.clip_of(source.clip)
    return align_prepare.open_data(config, clip, source.model.encoder, align._budgets(config, clip, source))


def stepped(config: AlignConfig) -> align.AlignTask:
    """The task after a step on two units, and a checkpoint of its exports."""
    data = data_of(config)
    task = align.AlignTask(config, torch.device("cpu"))
    if config.init:
        task.begin(None)
    trained = [p for p in task.module.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, 1e-2), []
    for number in (0, 0, 0):
        unit = units.unit_of(align_data.unit(number, 0, {}, data))
        assert unit.digest == units.unit_of(align_data.unit(number, 0, {}, data)).digest
        loss, _ = task.module(*task.tensors(unit))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    place = storage.join(config.run.dir, run_folder.CHECKPOINTS, "step_00000003-a")
    for stem in task.exports:
        state = {name: p.detach().clone() for name, p in getattr(task.module, stem).named_parameters() if p.requires_grad}
        model_folder.save_tensors(storage.join(place, f"{stem}.safetensors"), state)
    run_folder.commit(place, {"step": 3, "files": {}})
    answerer = load_video_language_model(config.run.dir)
    rows, media, count, _ = task.tensors(unit)
    answerer.model.eval()
    with torch.no_grad():
        expected = task.module.eval()(rows, media, count, False)[0]
        if config.train_parts == "all":
            media = tuple(answerer.encoder(one, grid) for one, grid in zip(media, answerer.model.grids, strict=True))
        torch.testing.assert_close(answerer.model(rows, media, count, False)[0], expected, atol=1e-5, rtol=0)
    return task


@pytest.mark.parametrize("words", [["language_model.lora={rank: 4, dropout: 0.2}"], ["train_parts=all"]], ids=["lora", "all"])
def test_a_checkpoint_resumes_to_the_bit(encoder, media, lists, llama, reporter, alone, tmp_path, words):
    source = [] if "train_parts=all" in words else [f"language_model.source={llama}"]
    config = prepared(tmp_path / "r", encoder, media, lists, reporter, "features=online", *words, *source)
    data = data_of(config)

    def started() -> tuple[align.AlignTask, TrainState]:
        torch.manual_seed(config.seed)
        task = align.AlignTask(config, torch.device("cpu"))
        return task, TrainState(task.module, make_optimizer([task.module], config.optim), frozen=task.saves_frozen)

    def step(task: align.AlignTask, state: TrainState, number: int) -> float:
        loss, _ = task.module(*task.tensors(units.unit_of(align_data.unit(number, number, {}, data))))
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.progress.step += 1
        return loss.item()

    task, state = started()
    first = [step(task, state, number) for number in range(2)]
    saver = Saver(config.run.dir, 2, {}, "a", None)
    saver.begin(state, task.exports, lambda: None)
    saver.finish()
    assert saver.error is None
    straight = [step(task, state, number) for number in range(2, 4)]
    resumed, again = started()
    again.load(run_folder.require_checkpoint(config.run.dir))
    assert [step(resumed, again, number) for number in range(2, 4)] == straight
    assert first[0] != straight[0]
    for (name, one), two in zip(task.module.named_parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_medium_that_fails_is_recorded_and_replaced(encoder, media, lists, reporter, alone, tmp_path):
    config = prepared(tmp_path / "r", encoder, media, lists, reporter, "features=online")
    data = data_of(config)
    shown = units.unit_of(align_data.unit(0, 0, {}, data))
    table = align_data._table(data.media)
    wrong = [[pts + 1 for pts in row] if kind == "image" else row
             for row, kind in zip(table["pts"].to_pylist(), table["kind"].to_pylist(), strict=True)]  # fmt: skip
    broken = table.set_column(2, "pts", pa.array(wrong, pa.list_(pa.int64())))
    other = align_data.AlignData(**{**vars(data), "media": broken})
    found = [units.unit_of(align_data.unit(number, number, {}, other)) for number in range(4)]
    failed = [row for unit in found for row in unit.failures]
    assert failed
    assert {row["reason"] for row in failed} == {"frames_missing"}
    assert all(row["replaced_by"].startswith("a/") and row["uri"].endswith("p.png") for row in failed)
    assert all(unit.array(align_data.SHAPE, np.int32, (4,))[2] == 0 for unit in found), "no picture is left"
    assert shown.array(align_data.SHAPE, np.int32, (4,))[0] >= 1


# Asking


def test_scores_and_answers_are_the_models_own(words, tmp_path):
    config = options_of(tmp_path / "x")
    causal_model.prepare(config.language_model, WORDS, 0, config.run.dir)
    model = language_model.build(config, SMALL, CLIP, None, train=False)
    answerer = language_model.Answerer(model, VisionTransformer(SMALL), words, CLIP, 64)
    visual = answerer.project(torch.randn(2, 8, 24))
    prompts = [
        Prompt([("human", "<video>\nWhich way?")], visual[0]),
        Prompt([("human", "What?"), ("gpt", "a cat"), ("human", "no?")], None),
    ]
    choices = [["left", "left right up"], ["yes", "no one", "mat"]]
    for prompt, options, scores in zip(prompts, choices, answerer.score(prompts, choices), strict=True):
        for option, total, mean in zip(options, *scores, strict=True):
            one, shown = answerer._encoded(Prompt([*prompt.turns, ("gpt", option)], prompt.visual), answered=True)
            ids, where = (torch.from_numpy(part).long()[None] for part in (one.ids, one.visual))
            vectors = model.embed(ids, torch.empty(0, 32) if shown is None else shown, where)
            logits = model.lm.model(inputs_embeds=vectors).logits[0].log_softmax(-1)
            spoken = len(options and words.tokenizer(option)["input_ids"]) + 1
            expected = sum(logits[place - 1, one.ids[place]].item() for place in range(len(one.ids) - spoken, len(one.ids)))
            assert total == pytest.approx(expected, abs=1e-4)
            assert mean == pytest.approx(expected / spoken, abs=1e-4)
    together = answerer.generate(prompts, 4)
    assert together == [answerer.generate([prompt], 4)[0] for prompt in prompts], "padding changes nothing"
    one, _ = answerer._encoded(prompts[1], answered=False)
    ids = one.ids.tolist()
    for _ in range(4):
        ids.append(int(model.lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in words.stops:
            break
    assert together[1] == words.decode(ids[len(one.ids) :])
    assert answerer.score([Prompt([("human", "<video>\nWhich way?")], None)], [["left"]]) == answerer.score(
        [Prompt([("human", "Which way?")], None)], [["left"]]
    ), "blind: the placeholder is dropped"
    with pytest.raises(InputRefused, match="do not divide"):
        answerer.score([Prompt([("human", "<video><video>?")], visual[0][:7])], [["left"]])
    with pytest.raises(InputRefused, match="longer than"):
        answerer.generate([Prompt([("human", "cat " * 80)], None)])


# Options and sources


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["conversations.a.weight=0"], "must be positive"),
        (["train_parts=projector", "language_model.lora.rank=4"], "train_parts=projector"),
        (["train_parts=all", "features=cached"], "frozen encoder"),
        (["features=online", "features_dir=x"], "features_dir"),
        (["language_model.built_in.heads=5"], "heads must divide"),
        (["projector.pool=[0,1,1]"], "projector.pool"),
        (["train.compile=true"], "train.compile"),
    ],
)
def test_options_that_cannot_be_meant(given, told):
    with pytest.raises(UsageError, match=told):
        options_of("r", *given)


def test_there_must_be_conversations():
    with pytest.raises(UsageError, match=r"conversations.NAME.uri"):
        load(AlignConfig, "align", ["run.dir=r", "encoder=e", "catalog=c", "train.steps=4"])


def test_sources_that_are_no_language_model(llama, tmp_path):
    config = options_of(tmp_path, f"language_model.source={tmp_path / 'nothing'}").language_model
    with pytest.raises(InputRefused, match="no tokenizer"):
        causal_model.prepare(config, (), 0, str(tmp_path / "r"))
    (tmp_path / "half").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / "half" / name).write_bytes(Path(llama, name).read_bytes())
    run = options_of(tmp_path / "h", f"language_model.source={tmp_path / 'half'}")
    causal_model.prepare(run.language_model, (), 0, run.run.dir)
    with pytest.raises(InputRefused, match="does not load"):
        language_model.build(run, SMALL, CLIP, None, train=True)
    (tmp_path / "half" / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(InputRefused, match=r"no model that transformers knows|no tokenizer"):
        causal_model.prepare(run.language_model, (), 0, run.run.dir)
    wrong = options_of(tmp_path / "w", f"language_model.source={llama}", "language_model.lora={rank: 2, target_modules: [nope]}")
    causal_model.prepare(wrong.language_model, (), 0, wrong.run.dir)
    with pytest.raises(UsageError, match=r"language_model.lora"):
        language_model.build(wrong, SMALL, CLIP, None, train=True)


def test_too_many_visual_tokens_and_too_many_refusals(words):
    row = {"kinds": ["video"] * 9, "turns": [{"role": "user", "text": "<video>" * 9}, {"role": "assistant", "text": "no"}]}
    with pytest.raises(align_prepare._TooMuch) as caught:
        align_prepare._encoded(words, row, {"video": 8}, 64)
    assert caught.value.reason == reasons.TOO_MANY_VISUAL_TOKENS
    config = options_of("r")
    with pytest.raises(InputRefused, match="more than max_refused"):
        align_prepare._check(config, {"refused": {"too_long": 2}, "conversations": {"a": 8}})
    with pytest.raises(InputRefused, match="leaves nothing"):
        align_prepare._check(config, {"refused": {"too_long": 2}, "conversations": {"a": 0}})


def test_a_run_of_another_stage_does_not_answer(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(InputRefused, match="is not a video-language run"):
        load_video_language_model(str(tmp_path))
