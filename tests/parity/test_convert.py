"""jepa convert: exact between official files, transformers folders and ours, in every direction; everything else is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import jepa
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from jepa_core import weights
from jepa_core.config import (
    ActionPredictorConfig,
    AttentiveConfig,
    EncoderConfig,
    PredictorConfig,
    encoder_config,
)
from jepa_core.weights import ACTION_PREDICTOR, ENCODER, PREDICTOR, PROBE, TARGET_ENCODER, ModelConfig
from pipelines import convert, model_folder
from pipelines.cli import main
from pipelines.config import ConvertConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.model_folder import ClipFormat, ModelFolder

SMALL = ModelConfig(
    encoder=EncoderConfig(dim=96, depth=2, heads=4),
    predictor=PredictorConfig(dim=48, depth=2, heads=4, num_mask_tokens=3, mask_token_by="clip"),
    action_predictor=ActionPredictorConfig(dim=64, depth=2, heads=4),
    probe=AttentiveConfig(depth=3, heads=4, num_classes=5, norm_eps=1e-6),
)
HEADS = ("heads=4", "predictor_heads=4", "probe_heads=4")
CLIP = ClipFormat(num_frames=8, crop_size=32, fps=4.0)


def states(config: ModelConfig, *parts: str, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of the given parts, under our names."""
    generator = torch.Generator().manual_seed(0)
    random = {}
    for part in parts:
        shapes = weights.expected_shapes(part, config)
        random[part] = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    return random


def official(path: Path, parts: dict, prefix: str = "module.backbone.", names: dict | None = None, **more) -> Path:
    """A .pt file as the reference's trainers write it."""
    renamed = {ACTION_PREDICTOR: "predictor", **(names or {})}
    entries = {renamed.get(part, part): {prefix + key: t for key, t in state.items()} for part, state in parts.items()}
    torch.save({**entries, **more}, path)
    return path


def run(reporter, source, destination, from_format, to_format, *options) -> dict:
    arguments = [f"source={source}", f"destination={destination}", f"from_format={from_format}", f"to_format={to_format}"]
    from pipelines.presets import load

    return convert.run(load(ConvertConfig, "convert", [*arguments, *options]), reporter)


def same(one: dict, other: dict) -> None:
    """Every key, in any order; every bit; every type."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            same(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert value.dtype == other[key].dtype, key
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def folder(tmp_path: Path, *parts: str, config: ModelConfig = SMALL, dtype: torch.dtype = torch.float32) -> str:
    """A model folder of ours with random weights."""
    sections = {"encoder": config.encoder if {ENCODER, TARGET_ENCODER} & set(parts) else None}
    sections |= {part: getattr(config, part) if part in parts else None for part in (PREDICTOR, ACTION_PREDICTOR, PROBE)}
    uri = str(tmp_path / "ours")
    model_folder.write(ModelFolder(ModelConfig(**sections), states(config, *parts, dtype=dtype), clip=CLIP), uri)
    return uri


# ---- Exact in every direction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "parts", [(ENCODER, TARGET_ENCODER, PREDICTOR), (ENCODER, ACTION_PREDICTOR), (ENCODER, PREDICTOR, PROBE), (TARGET_ENCODER,)]
)
def test_ours_to_official_and_back(parts, dtype, tmp_path, reporter):
    ours = folder(tmp_path, *parts, dtype=dtype)
    run(reporter, ours, tmp_path / "x.pt", "jepa", "vjepa2")
    run(reporter, tmp_path / "x.pt", tmp_path / "back", "vjepa2", "jepa", *HEADS)
    before, after = model_folder.read(ours), model_folder.read(str(tmp_path / "back"))
    same(before.parts, after.parts)
    assert replace(after.config, probe=None) == replace(before.config, probe=None)


V21 = ModelConfig(
    encoder=EncoderConfig(dim=96, depth=4, heads=4, levels=4, position="rope_interpolated", image_tokenizer=True),
    predictor=PredictorConfig(
        dim=48, depth=4, heads=4, num_mask_tokens=2, levels=4, predict_context=True, target_dim=0, mask_token_by="clip"
    ),
)
V21_DISTILLED = replace(V21, predictor=replace(V21.predictor, levels=1, target_dim=160))
V1 = ModelConfig(
    encoder=EncoderConfig(dim=96, depth=2, heads=4, position="sincos", native_grid=(8, 4, 4)),
    predictor=PredictorConfig(dim=48, depth=2, heads=4, num_mask_tokens=2),
)
IJEPA = ModelConfig(
    encoder=EncoderConfig(
        dim=96, depth=2, heads=4, position="sincos_image", tubelet_size=1, patch_size=14, native_grid=(1, 4, 4)
    ),
    predictor=PredictorConfig(dim=48, depth=2, heads=4, num_mask_tokens=1),
)
STUDENT_TEACHER = (ENCODER, TARGET_ENCODER, PREDICTOR)


@pytest.mark.parametrize(
    ("config", "parts", "prefix", "names", "stale", "options"),
    [
        (SMALL, STUDENT_TEACHER, "module.backbone.", {}, {}, ()),
        (SMALL, STUDENT_TEACHER, "module.backbone.", {},
         {ENCODER: {"pos_embed": (1, 64, 96)}, PREDICTOR: {"predictor_pos_embed": (1, 64, 48)}}, ()),
        (SMALL, STUDENT_TEACHER, "", {}, {}, ()),
        (SMALL, (ENCODER, ACTION_PREDICTOR), "module.", {},
         {ACTION_PREDICTOR: {"extrinsics_encoder.weight": (64, 6), "extrinsics_encoder.bias": (64,)}}, ()),
        (V21, STUDENT_TEACHER, "module.backbone.", {}, {}, ()),
        (V21_DISTILLED, (TARGET_ENCODER, PREDICTOR), "module.backbone.", {TARGET_ENCODER: "ema_encoder"}, {}, ()),
        (V1, STUDENT_TEACHER, "module.backbone.", {}, {}, ("family=vjepa1",)),
        (IJEPA, STUDENT_TEACHER, "module.", {}, {}, ("family=ijepa",)),
    ],
    ids=["vjepa2", "stale tables", "no wrapper", "action", "2.1", "2.1 distilled", "vjepa1", "ijepa"],
)  # fmt: skip
def test_official_to_ours_and_back(config, parts, prefix, names, stale, options, tmp_path, reporter):
    saved = states(config, *parts)
    for part, shapes in stale.items():
        saved[part] |= {key: torch.randn(shape) for key, shape in shapes.items()}
    if config is IJEPA:
        saved[PREDICTOR]["mask_token"] = saved[PREDICTOR].pop("mask_tokens.0")
    path = official(tmp_path / "a.pt", saved, prefix, names, epoch=7, lr=0.1, opt={"state": {}}, scaler=None)

    result = run(reporter, path, tmp_path / "ours", "vjepa2", "jepa", "heads=4", "predictor_heads=4", *options)
    assert result["left_behind"] == ["lr", "opt", "scaler"]
    assert result["never_read"] == [f"{part}/{key}" for part, shapes in stale.items() for key in shapes]
    assert (tmp_path / "ours" / "unused.safetensors").exists() == bool(stale)
    model = model_folder.read(str(tmp_path / "ours"))
    assert model.config.encoder == config.encoder
    if PREDICTOR in parts:
        assert model.config.predictor == config.predictor

    run(reporter, tmp_path / "ours", tmp_path / "b.pt", "jepa", "vjepa2")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    same({name: value for name, value in before.items() if name not in ("lr", "opt", "scaler")}, after)
    assert (tmp_path / "b.pt").stat().st_size < 1.1 * path.stat().st_size


def test_official_probe_files(tmp_path, reporter):
    probes = [{f"module.{key}": t + n for key, t in states(SMALL, PROBE)[PROBE].items()} for n in range(2)]
    torch.save({"classifiers": probes, "opt": None, "epoch": 20}, tmp_path / "two.pt")
    with pytest.raises(UsageError, match="holds 2 classifiers: say which as classifier=0"):
        run(reporter, tmp_path / "two.pt", tmp_path / "x", "vjepa2", "jepa", *HEADS)
    with pytest.raises(UsageError, match="classifier=5"):
        run(reporter, tmp_path / "two.pt", tmp_path / "x", "vjepa2", "jepa", "classifier=5", *HEADS)
    result = run(reporter, tmp_path / "two.pt", tmp_path / "x", "vjepa2", "jepa", "classifier=1", *HEADS)
    assert result["left_behind"] == ["opt", "classifiers[0]"]
    run(reporter, tmp_path / "x", tmp_path / "one.pt", "jepa", "vjepa2")
    written = torch.load(tmp_path / "one.pt", weights_only=True)
    assert (written.keys(), len(written["classifiers"]), written["epoch"]) == ({"classifiers", "epoch"}, 1, 20)
    same(written["classifiers"][0], probes[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [(ENCODER, PREDICTOR), (ENCODER, PREDICTOR, PROBE)])
def test_ours_to_transformers_and_back(parts, dtype, tmp_path, reporter):
    ours = folder(tmp_path, *parts, dtype=dtype)
    run(reporter, ours, tmp_path / "hf", "jepa", "transformers")
    run(reporter, tmp_path / "hf", tmp_path / "back", "transformers", "jepa")
    before, after = model_folder.read(ours), model_folder.read(str(tmp_path / "back"))
    same(before.parts, after.parts)
    assert before.config == after.config
    assert (after.clip.num_frames, after.clip.crop_size) == (8, 32)


def test_fused_rows_are_split_in_the_order_of_the_reference(tmp_path, reporter):
    """Query, key and value; a map that confuses them both ways would still be exact there and back."""
    ours = folder(tmp_path, ENCODER, PREDICTOR, PROBE)
    run(reporter, ours, tmp_path / "hf", "jepa", "transformers")
    parts, theirs = model_folder.read(ours).parts, load_file(tmp_path / "hf" / "model.safetensors")
    names = ("query", "key", "value")
    qkv = [theirs[f"vjepa2.encoder.layer.1.attention.{name}.weight"] for name in names]
    assert torch.equal(torch.cat(qkv), parts[ENCODER]["blocks.1.attn.qkv.weight"])
    qkv = [theirs[f"vjepa2.predictor.layer.0.attention.{name}.bias"] for name in names]
    assert torch.equal(torch.cat(qkv), parts[PREDICTOR]["predictor_blocks.0.attn.qkv.bias"])
    kv = [theirs[f"pooler.cross_attention_layer.cross_attn.{name}_proj.weight"] for name in "kv"]
    assert torch.equal(torch.cat(kv), parts[PROBE]["pooler.cross_attention_block.xattn.kv.weight"])
    tokens = theirs["vjepa2.predictor.embeddings.mask_tokens"]
    assert torch.equal(tokens[2], parts[PREDICTOR]["mask_tokens.2"])


def test_student_or_teacher_is_said(tmp_path, reporter):
    ours = folder(tmp_path, *STUDENT_TEACHER)
    with pytest.raises(UsageError, match=r"encoder=encoder .* or encoder=target_encoder"):
        run(reporter, ours, tmp_path / "hf", "jepa", "transformers")
    parts = model_folder.read(ours).parts
    for choice in (ENCODER, TARGET_ENCODER):
        run(reporter, ours, tmp_path / choice, "jepa", "transformers", f"encoder={choice}")
        theirs = load_file(tmp_path / choice / "model.safetensors")
        assert torch.equal(theirs["encoder.layernorm.weight"], parts[choice]["norm.weight"])
        run(reporter, tmp_path / choice, tmp_path / f"back-{choice}", "transformers", "jepa", f"encoder={choice}")
        same(model_folder.read(str(tmp_path / f"back-{choice}")).parts[choice], parts[choice])


# ---- Against transformers itself


def their_model(kind: str, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.VJEPA2Config(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=48 / 11, pred_hidden_size=48,
        pred_num_hidden_layers=2, pred_num_attention_heads=4, pred_num_mask_tokens=3, num_pooler_layers=2,
        crop_size=32, frames_per_clip=8, **options,
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("kind", ["VJEPA2Model", "VJEPA2ForVideoClassification"])
def test_transformers_to_ours_and_back(kind, tmp_path, reporter):
    import transformers

    labels = {0: "pour", 1: "push", 2: "pull"}
    options = {"id2label": labels, "label2id": {name: n for n, name in labels.items()}} if "Class" in kind else {}
    theirs = their_model(kind, **options)
    theirs.save_pretrained(tmp_path / "hf")
    run(reporter, tmp_path / "hf", tmp_path / "ours", "transformers", "jepa")
    model = model_folder.read(str(tmp_path / "ours"))
    for part, state in model.parts.items():
        built = weights.build(part, model.config, state)
        assert built.load_state_dict(state, strict=True)
    assert model.kind == ("probe" if "Class" in kind else "pretraining")

    run(reporter, tmp_path / "ours", tmp_path / "back", "jepa", "transformers")
    same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    assert before == after
    loaded, info = getattr(transformers, kind).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    same(dict(theirs.state_dict()), dict(loaded.state_dict()))


@pytest.mark.parametrize("parts", [(ENCODER, PREDICTOR), (ENCODER, PREDICTOR, PROBE)])
def test_our_export_loads_in_transformers(parts, tmp_path, reporter):
    transformers = pytest.importorskip("transformers")
    run(reporter, folder(tmp_path, *parts), tmp_path / "hf", "jepa", "transformers")
    kind = transformers.VJEPA2ForVideoClassification if PROBE in parts else transformers.VJEPA2Model
    model, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    same(dict(model.state_dict()), load_file(tmp_path / "hf" / "model.safetensors"))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").crop_size == 32


def test_names_of_the_first_converter_and_shards_are_read(tmp_path, reporter):
    run(reporter, folder(tmp_path, ENCODER, PREDICTOR), tmp_path / "hf", "jepa", "transformers")
    single = tmp_path / "hf" / "model.safetensors"
    state = {key.replace("attention.query", "attention.attention.query"): t for key, t in load_file(single).items()}
    shards = {"model-1.safetensors": dict(list(state.items())[:9]), "model-2.safetensors": dict(list(state.items())[9:])}
    single.unlink()
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / "hf" / name, metadata={"format": "pt"})
    index = {"weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    run(reporter, tmp_path / "hf", tmp_path / "back", "transformers", "jepa")
    same(model_folder.read(str(tmp_path / "back")).parts, model_folder.read(str(tmp_path / "ours")).parts)


def test_keys_of_the_published_vit_large_are_complete():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.VJEPA2Model(transformers.VJEPA2Config()).state_dict()
    config = convert._config_from_transformers({"model_type": "vjepa2"}, theirs, "published")
    assert (config.encoder, config.predictor) == (
        encoder_config("vit_large"),
        PredictorConfig(num_mask_tokens=10, mask_token_by="clip"),
    )
    ours = weights.from_transformers(theirs, config)
    for part, state in ours.items():
        assert {key: t.shape for key, t in state.items()} == weights.expected_shapes(part, config)


# ---- Published sizes


@pytest.mark.parametrize(
    ("size", "encoder", "predictor"),
    [
        ("vit_tiny", 5_633_856, 21_446_208),
        ("vit_small", 21_884_544, 21_593_856),
        ("vit_base", 86_236_416, 21_889_152),
        ("vit_large", 303_885_312, 22_086_016),
        ("vit_huge", 631_648_000, 22_282_880),
        ("vit_giant", 1_012_173_952, 22_381_312),
    ],
)
def test_published_sizes_are_recognised_by_their_shapes(size, encoder, predictor):
    config = ModelConfig(encoder_config(size), PredictorConfig(num_mask_tokens=10, mask_token_by="clip"))
    shapes = {part: weights.expected_shapes(part, config) for part in (ENCODER, PREDICTOR)}
    assert {part: sum(shape.numel() for shape in keys.values()) for part, keys in shapes.items()} == {
        ENCODER: encoder,
        PREDICTOR: predictor,
    }
    empty = {part: {key: torch.empty(s, device="meta") for key, s in keys.items()} for part, keys in shapes.items()}
    assert weights.infer_config(empty, weights.Unseen()) == config


def test_published_21_and_action_models_are_recognised_by_their_shapes():
    distilled = ModelConfig(
        encoder_config("vit_large", levels=4, position="rope_interpolated", image_tokenizer=True),
        PredictorConfig(num_mask_tokens=8, mask_token_by="clip", predict_context=True, target_dim=1664),
    )
    gigantic = ModelConfig(
        encoder_config("vit_gigantic", levels=4, position="rope_interpolated", image_tokenizer=True),
        PredictorConfig(depth=24, num_mask_tokens=8, mask_token_by="clip", predict_context=True, levels=4),
    )
    action = ModelConfig(encoder_config("vit_giant"), action_predictor=ActionPredictorConfig())
    for config, parts in [
        (distilled, (ENCODER, PREDICTOR)),
        (gigantic, (ENCODER, PREDICTOR)),
        (action, (ENCODER, ACTION_PREDICTOR)),
    ]:
        shapes = {part: weights.expected_shapes(part, config) for part in parts}
        empty = {part: {key: torch.empty(s, device="meta") for key, s in keys.items()} for part, keys in shapes.items()}
        assert weights.infer_config(empty, weights.Unseen()) == config
    # Keys of the released distilled ViT-L, as third parties counted them.
    assert [len(weights.expected_shapes(part, distilled)) for part in (ENCODER, PREDICTOR)] == [302, 162]
    # 305,220,992 in the reference, which always has the camera's layer.
    counted = sum(shape.numel() for shape in weights.expected_shapes(ACTION_PREDICTOR, action).values())
    assert counted + 6 * 1024 + 1024 == 305_220_992


# ---- Refusals


def refused(capsys, *arguments: str) -> str:
    """The sentence that a command ends with, at exit code 3."""
    code = main(["convert", *map(str, arguments)])
    message = json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
    assert code == 3, message
    assert "\n" not in message
    return message


class Odd:
    """Something that only unpickles as code."""


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncated", ["no whole .pt file"]),
        ("garbage", ["no whole .pt file"]),
        ("cut inside", ["is damaged and cannot be read as a .pt file"]),
        ("missing key", ["1 missing (blocks.1.attn.qkv.bias)"]),
        ("extra key", ["1 unexpected (cls_token)"]),
        ("wrong shape", ["1 wrongly shaped (norm.weight [95] for [96])"]),
        ("one unwrapped key", ["blocks.0.mlp.fc1.weight is missing among 28 keys (module.backbone."]),
        ("no blocks", ["blocks.0.mlp.fc1.weight is missing"]),
        ("pickled object", ["Python objects (test_convert.Odd)", "only load by running code"]),
        ("other entries", ["none of the entries encoder", "it holds model, optimizer"]),
        ("a list", ["holds a list"]),
        ("not tensors", ["its entry encoder is no state dict"]),
        ("mask tokens gone", ["predictor: no mask token among"]),
        ("student unlike teacher", ["different shapes"]),
        ("heads unknown", ["width 96 with 2 blocks is no published size", "heads=N"]),
        ("predictor heads unknown", ["predictor_heads=N"]),
    ],
)
def test_official_files_that_do_not_fit(damage, words, tmp_path, capsys):
    parts = states(SMALL, *STUDENT_TEACHER)
    state, path, options = parts[ENCODER], tmp_path / "a.pt", list(HEADS)
    edits = {
        "missing key": lambda: state.pop("blocks.1.attn.qkv.bias"),
        "extra key": lambda: state.update(cls_token=torch.zeros(1)),
        "wrong shape": lambda: state.update({"norm.weight": torch.zeros(95)}),
        "no blocks": lambda: [state.pop(key) for key in list(state) if key.startswith("blocks")],
        "mask tokens gone": lambda: [parts[PREDICTOR].pop(f"mask_tokens.{n}") for n in range(3)],
        "student unlike teacher": lambda: parts.update(
            states(replace(SMALL, encoder=replace(SMALL.encoder, depth=3)), TARGET_ENCODER)
        ),
        "heads unknown": options.clear,
        "predictor heads unknown": lambda: options.remove("predictor_heads=4"),
    }
    edits.get(damage, lambda: None)()
    official(path, parts)
    contents = torch.load(path, weights_only=True)
    if damage == "one unwrapped key":
        contents["encoder"]["patch_embed.proj.weight"] = contents["encoder"].pop("module.backbone.patch_embed.proj.weight")
    others = {
        "pickled object": {**contents, "config": Odd()},
        "other entries": {"model": contents["encoder"], "optimizer": 1},
        "a list": [1, 2],
        "not tensors": {"encoder": {"weight": [1.0]}},
    }
    torch.save(others.get(damage, contents), path)
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "garbage":
        path.write_bytes(b"not a checkpoint" * 100)
    elif damage == "cut inside":
        path.write_bytes(data[:200] + bytes(400) + data[600:])
    message = refused(capsys, "--from", "vjepa2", "--to", "jepa", path, tmp_path / "out", *options)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing key", ["1 missing (encoder.layer.1.attention.key.weight)"]),
        ("extra key", ["1 unexpected (encoder.cls_token)"]),
        ("wrong shape", ["wrongly shaped (encoder.layernorm.weight [95] for [96])"]),
        ("truncated", ["no whole safetensors file"]),
        ("no weights", ["model.safetensors does not exist"]),
        ("no config", ["config.json does not exist"]),
        ("broken config", ["is not JSON"]),
        ("other model", ["'vit' model"]),
        ("other activation", ["hidden_act='relu'", "shows in no weight"]),
        ("more layers promised", ["missing (encoder.layer.2."]),
    ],
)
def test_transformers_folders_that_do_not_fit(damage, words, tmp_path, reporter, capsys):
    run(reporter, folder(tmp_path, ENCODER, PREDICTOR), tmp_path / "hf", "jepa", "transformers")
    file, config = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    state, tree = load_file(file), json.loads(config.read_text())
    edits = {
        "missing key": lambda: state.pop("encoder.layer.1.attention.key.weight"),
        "extra key": lambda: state.update({"encoder.cls_token": torch.zeros(1)}),
        "wrong shape": lambda: state.update({"encoder.layernorm.weight": torch.zeros(95)}),
        "other model": lambda: tree.update(model_type="vit"),
        "other activation": lambda: tree.update(hidden_act="relu"),
        "more layers promised": lambda: tree.update(num_hidden_layers=3),
    }
    edits.get(damage, lambda: None)()
    save_file({key: t.clone() for key, t in state.items()}, file)
    config.write_text("{" if damage == "broken config" else json.dumps(tree))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage in ("no weights", "no config"):
        (file if damage == "no weights" else config).unlink()
    message = refused(capsys, "--from=transformers", "--to=jepa", tmp_path / "hf", tmp_path / "out")
    assert all(word in message for word in words), message


def test_our_folders_that_do_not_fit(tmp_path, capsys):
    ours = Path(folder(tmp_path, ENCODER, PREDICTOR))
    arguments = ["--from", "jepa", "--to", "vjepa2", ours, tmp_path / "x.pt"]
    tree = json.loads((ours / "model.json").read_text())
    for edit, words in [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "format 'other'"),
        ({"parts": ["encoder", "decoder"]}, "decoder"),
        ({"config": {"encoder": {"width": 3}}}, "width"),
        ({"config": {"encoder": tree["config"]["encoder"]}}, "predictor: the model's configuration does not describe it"),
        ({"config": tree["config"] | {"encoder": tree["config"]["encoder"] | {"depth": 3}}}, "missing (blocks.2."),
    ]:
        (ours / "model.json").write_text(json.dumps(tree | edit))
        assert words in refused(capsys, *arguments)
    (ours / "model.json").write_text(json.dumps(tree))
    (ours / "predictor.safetensors").unlink()
    assert "predictor.safetensors does not exist" in refused(capsys, *arguments)
    (ours / "model.json").unlink()
    assert "neither model.json nor config.yaml" in refused(capsys, *arguments)
    assert "does not exist" in refused(capsys, "--from", "jepa", "--to", "vjepa2", tmp_path / "nowhere", tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("config", "parts", "words"),
    [
        (V21, (ENCODER, PREDICTOR), ["V-JEPA 2.1"]),
        (V1, (ENCODER, PREDICTOR), ["its positions are rotary, these are sincos"]),
        (SMALL, (ENCODER, ACTION_PREDICTOR), ["V-JEPA 2-AC"]),
        (SMALL, (ENCODER,), ["would start the missing one from random numbers"]),
        (SMALL, (PROBE,), ["holds no encoder"]),
        (replace(SMALL, probe=replace(SMALL.probe, num_queries=2)), (ENCODER, PREDICTOR, PROBE), ["one query"]),
        (replace(SMALL, encoder=replace(SMALL.encoder, tubelet_size=1)), (ENCODER, PREDICTOR), ["tubelet_size=1"]),
        (replace(SMALL, probe=replace(SMALL.probe, norm_eps=1e-5, heads=8)), (ENCODER, PREDICTOR, PROBE),
         ["norm_eps=1e-05 and 8 heads", "norm_eps=1e-06 and the encoder's 4 heads", "allow_different_probe=true"]),
    ],
)  # fmt: skip
def test_what_transformers_cannot_express(config, parts, words, tmp_path, capsys):
    ours = folder(tmp_path, *parts, config=config)
    message = refused(capsys, "--from", "jepa", "--to", "transformers", ours, tmp_path / "hf")
    assert all(word in message for word in words), message
    assert not (tmp_path / "hf").exists()


def test_an_official_probe_joins_its_encoder(tmp_path, reporter, capsys):
    backbone = official(tmp_path / "a.pt", states(SMALL, *STUDENT_TEACHER))
    probe = states(SMALL, PROBE)[PROBE]
    torch.save({"classifiers": [{f"module.{key}": t for key, t in probe.items()}]}, tmp_path / "probe.pt")
    arguments = ["--from", "vjepa2", "--to", "transformers", backbone, tmp_path / "hf", f"probe={tmp_path}/probe.pt",
                 "encoder=target_encoder", "crop_size=32", "num_frames=8", *HEADS]  # fmt: skip
    assert "allow_different_probe=true" in refused(capsys, *arguments)
    assert main(["convert", *map(str, arguments), "allow_different_probe=true"]) == 0
    run(reporter, tmp_path / "hf", tmp_path / "back", "transformers", "jepa")
    same(model_folder.read(str(tmp_path / "back")).parts[PROBE], probe)


def test_a_size_of_clips_that_nobody_said_is_asked_for(tmp_path, reporter):
    path = official(tmp_path / "a.pt", states(SMALL, ENCODER, PREDICTOR))
    with pytest.raises(UsageError, match=r"crop_size=N .*num_frames=N"):
        run(reporter, path, tmp_path / "hf", "vjepa2", "transformers", *HEADS)


def test_an_action_predictor_that_official_code_would_run_otherwise(tmp_path, reporter):
    config = replace(SMALL, action_predictor=replace(SMALL.action_predictor, action_scale=10.0))
    with pytest.raises(InputRefused, match=r"action_scale=10\.0"):
        run(reporter, folder(tmp_path, ENCODER, ACTION_PREDICTOR, config=config), tmp_path / "x.pt", "jepa", "vjepa2")


def test_destinations_are_never_overwritten(tmp_path, reporter):
    ours = folder(tmp_path, ENCODER, PREDICTOR)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "x.pt").write_text("mine")
    for destination, to_format, words in [
        (tmp_path / "full", "transformers", "holds other files"),
        (tmp_path / "full", "jepa", "holds other files"),
        (tmp_path / "x.pt", "vjepa2", "exists"),
        (tmp_path / "ours", "jepa", "is a converted model already"),
    ]:
        with pytest.raises(UsageError, match=words):
            run(reporter, ours, destination, "jepa", to_format)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "encoder.safetensors").write_bytes(b"of an interrupted conversion")
    run(reporter, ours, tmp_path / "torn", "jepa", "jepa")
    same(model_folder.read(str(tmp_path / "torn")).parts, model_folder.read(ours).parts)


# ---- Run folders and the command line


def test_a_pretraining_run_becomes_a_transformers_folder(tmp_path, reporter):
    from pipelines import run_folder
    from pipelines.config import PretrainConfig
    from pipelines.presets import load, to_yaml

    options = ["catalog=a", f"run.dir={tmp_path}/run", "train.steps=1", "model.encoder.dim=96", "model.encoder.depth=2",
               "model.encoder.heads=4", "model.predictor.dim=48", "model.predictor.depth=2", "model.predictor.heads=4",
               "clip.crop_size=32", "clip.num_frames=8"]  # fmt: skip
    run_config = load(PretrainConfig, "pretrain", options)
    config = ModelConfig(run_config.model.encoder, replace(run_config.model.predictor, num_mask_tokens=2))
    parts = states(config, *STUDENT_TEACHER)
    (tmp_path / "step").mkdir()
    for part, state in parts.items():
        save_file(state, tmp_path / "step" / f"{part}.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(run_config))
    checkpoint = run_folder.checkpoint_folder(str(tmp_path / "run"), 1, "abcdef")
    run_folder.commit(checkpoint, {"step": 1, "files": run_folder.publish(tmp_path / "step", checkpoint)})

    run(reporter, tmp_path / "run", tmp_path / "hf", "jepa", "transformers", "encoder=encoder")
    tree = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (tree["crop_size"], tree["frames_per_clip"], tree["pred_num_mask_tokens"]) == (32, 8, 2)
    run(reporter, tmp_path / "hf", tmp_path / "back", "transformers", "jepa")
    back = model_folder.read(str(tmp_path / "back"))
    same(back.parts, {part: parts[part] for part in (ENCODER, PREDICTOR)})
    assert back.config.encoder == run_config.model.encoder


def test_a_post_training_run_becomes_an_official_file(tmp_path, reporter):
    from pipelines import post_train, run_folder
    from pipelines.config import PostTrainConfig, PretrainConfig
    from pipelines.presets import load, to_yaml

    before = load(PretrainConfig, "pretrain", ["catalog=a", "run.dir=b", "train.steps=1", "model.encoder.dim=96",
                                               "model.encoder.depth=2", "model.encoder.heads=4"])  # fmt: skip
    run_config = load(PostTrainConfig, "post-train", ["trajectories=a", "encoder=b", f"run.dir={tmp_path}/run", "train.steps=1",
                                                      "predictor.dim=64", "predictor.depth=2", "predictor.heads=4"])  # fmt: skip
    config = ModelConfig(before.model.encoder, action_predictor=run_config.predictor)
    parts = states(config, ENCODER, ACTION_PREDICTOR)
    (tmp_path / "step").mkdir()
    save_file(parts[ACTION_PREDICTOR], tmp_path / "step" / f"{post_train.PREDICTOR}.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(run_config))
    (tmp_path / "run" / post_train.ENCODER_CONFIG).write_text(json.dumps(OmegaConf.to_container(OmegaConf.structured(before))))
    save_file(parts[ENCODER], tmp_path / "run" / post_train.ENCODER_FILE)
    checkpoint = run_folder.checkpoint_folder(str(tmp_path / "run"), 1, "abcdef")
    run_folder.commit(checkpoint, {"step": 1, "files": run_folder.publish(tmp_path / "step", checkpoint)})

    run(reporter, tmp_path / "run", tmp_path / "x.pt", "jepa", "vjepa2")
    written = torch.load(tmp_path / "x.pt", weights_only=True)
    assert set(written) == {"encoder", "predictor", "epoch"}
    same(written["predictor"], {f"module.{key}": t for key, t in parts[ACTION_PREDICTOR].items()})
    run(reporter, tmp_path / "x.pt", tmp_path / "back", "vjepa2", "jepa", *HEADS)
    same(model_folder.read(str(tmp_path / "back")).parts, parts)


def test_the_command_line_takes_flags_words_and_options(tmp_path):
    ours = folder(tmp_path, ENCODER, PREDICTOR)
    result = jepa("convert", "--from", "jepa", "--to=vjepa2", ours, str(tmp_path / "x.pt"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["parts"] == [ENCODER, PREDICTOR]
    assert (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "jepa", "--to"], "--to needs a value"),
        (["--form", "jepa", "--to", "jepa", "a", "b"], "unknown option --form"),
        (["--from", "jepa", "--to", "onnx", "a", "b"], "onnx"),
        (["--from", "jepa", "--to", "jepa", "a"], "destination is missing"),
        (["--from", "jepa", "--to", "jepa", "a", "b", "c"], "'c' is not key=value"),
        (["--from", "jepa", "--to", "vjepa2", "a", "b", "encoder=encoder"], "neither side is one"),
        (["--from", "jepa", "--to", "vjepa2", "a", "b", "heads=3"], "heads=3 is for official files"),
        (["--from", "jepa", "--to", "vjepa2", "a", "b", "encodr=encoder"], "did you mean encoder?"),
    ],
)
def test_usage_mistakes_are_named(arguments, words, capsys):
    assert main(["convert", *arguments]) == 2
    assert words in json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
