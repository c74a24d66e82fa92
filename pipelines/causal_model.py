"""Causal language models of `transformers`: found, built, adapted and kept in a run. Nothing else imports the library's models.

    RUN/language_model/          tokenizer and configuration, copied once
    RUN/language_model.json      where weights come from, and a fingerprint of those files
    RUN/language_model.safetensors  weights to start from that no folder of the user holds: those that an earlier stage tuned, or
                                    the random ones of the built-in model
    RUN/adapters.safetensors        adapters that an earlier stage trained

Checkpoints add what a run trains. The library and peft are loaded when they are needed: they are the extra `vidqa`.
"""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import model_folder, run_folder, storage
from pipelines.align_config import BuiltInConfig, LanguageModelConfig
from pipelines.chat import Chat, word_tokenizer
from pipelines.errors import InputRefused, UsageError

FOLDER, RECORD = "language_model", "language_model.json"
WEIGHTS, ADAPTERS = "language_model.safetensors", "adapters.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LORA = ".lora_"
"""Within the names of adapters' weights."""
_NEEDED = ("transformers", "peft", "tokenizers")


def check_installed() -> None:
    """Raise UsageError where the extra is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{missing[0]} is not installed: pip install 'jepa-pipeline[vidqa]'")


def is_folder(source: str) -> bool:
    """Whether a source is a folder on this machine; anything else is a name that the library resolves."""
    return os.path.isdir(source)


def open_tokenizer(source: str) -> Any:
    """The tokenizer of a folder or a name. Raises InputRefused where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=is_folder(source))
    except Exception as error:
        raise InputRefused(f"language_model.source={source} has no tokenizer that can be read: {_line(error)}") from error


def prepare(config: LanguageModelConfig, texts: Iterable[str], seed: int, run_dir: str) -> None:
    """Put tokenizer, configuration and the record of a source into a run, once; of the built-in model its weights too.

    `texts` are what a built-in vocabulary is made of. Raises InputRefused for a source that cannot be used.
    """
    if config.source:
        tokenizer, architecture = open_tokenizer(config.source), _architecture(config.source)
    else:
        tokenizer = word_tokenizer(texts, config.built_in.vocabulary)
        architecture = _llama(config.built_in, tokenizer, config.max_length)
    with tempfile.TemporaryDirectory(prefix="jepa-language-model-") as local:
        tokenizer.save_pretrained(local)
        architecture.save_pretrained(local)
        run_folder.publish(Path(local), storage.join(run_dir, FOLDER))
    if not config.source:
        torch.manual_seed(seed)
        _save(storage.join(run_dir, WEIGHTS), dict(_empty(architecture, torch.float32).named_parameters()))
    run_folder.write_json(run_dir, RECORD, {"source": config.source, "files": _fingerprint(config.source)})


def inherit(config: LanguageModelConfig, before: str, trained: dict[str, Tensor], run_dir: str) -> None:
    """Take tokenizer and configuration of an earlier stage's run, and the weights that it has `trained` or had itself."""
    for info in storage.list_files(storage.join(before, FOLDER)):
        storage.write_bytes(storage.join(run_dir, FOLDER, info.uri.rpartition("/")[2]), storage.read_bytes(info.uri))
    record = run_folder.read_json(before, RECORD)
    if config.source and config.source != record["source"]:
        record = {"source": config.source, "files": _fingerprint(config.source)}
    lora = any(LORA in name for name in trained)
    for file, newer in ((WEIGHTS, {} if lora else trained), (ADAPTERS, trained if lora else {})):
        state = _kept(before, file) | newer
        if state:
            _save(storage.join(run_dir, file), state)
    run_folder.write_json(run_dir, RECORD, record)


def open_chat(run_dir: str) -> Chat:
    """Tokenizer and template of a run."""
    with _local(storage.join(run_dir, FOLDER)) as folder:
        return Chat(open_tokenizer(folder))


def open_model(config: LanguageModelConfig, run_dir: str, *, train: bool) -> nn.Module:
    """The language model of a run before its checkpoints: `transformers`' module, with adapters where the configuration has them.

    Parameters require gradients where `train` and the configuration say so. Raises InputRefused where the source has changed or
    the kept weights do not fit.
    """
    record = run_folder.read_json(run_dir, RECORD)
    if record is None:
        raise InputRefused(f"{run_dir} holds no {RECORD}: it is no run of jepa align, or it has not begun")
    source, dtype = record["source"], DTYPES[config.dtype]
    state, adapters = _kept(run_dir, WEIGHTS), _kept(run_dir, ADAPTERS)
    if source:
        if _fingerprint(source) != record["files"]:
            raise InputRefused(f"{source} is not the folder that {run_dir} began with (names or sizes of its files differ)")
        model = _pretrained(source, dtype)
    else:
        with _local(storage.join(run_dir, FOLDER)) as folder:
            model = _empty(_architecture(folder), dtype)
    if state:
        _take(model, state, run_dir, whole=not source)
    model.config.use_cache = False
    full = train and not config.lora.rank
    model.requires_grad_(full)
    if full:
        model.float()
    if config.lora.rank:
        model = _with_adapters(model, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(train and LORA in name)
    elif adapters:
        raise InputRefused(f"{run_dir} starts from adapters: give language_model.lora.rank as there, or another init")
    if adapters:
        _take(model, adapters, run_dir, whole=False)
    if config.gradient_checkpointing and train:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _kept(run_dir: str, file: str) -> dict[str, Tensor]:
    uri = storage.join(run_dir, file)
    return dict(model_folder.load_tensors(uri)) if storage.exists(uri) else {}


def _save(uri: str, state: Mapping[str, Tensor]) -> None:
    model_folder.save_tensors(uri, {name: tensor.detach().clone() for name, tensor in state.items()})  # none may share memory


def take_trained(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """The weights that a checkpoint holds, over those the model has. Raises InputRefused for names or shapes that do not fit."""
    _take(model, state, where, whole=False)


def _take(model: nn.Module, state: dict[str, Tensor], where: str, *, whole: bool) -> None:
    own = model.state_dict()
    wrong = [name for name, tensor in state.items() if name not in own or own[name].shape != tensor.shape]
    wrong += [name for name, _ in model.named_parameters() if whole and name not in state]
    if wrong:
        raise InputRefused(f"{where}: {len(wrong)} weights do not fit the language model, first {wrong[0]}")
    model.load_state_dict(state, strict=False)


def _with_adapters(model: nn.Module, config: LanguageModelConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    named = list(lora.target_modules)
    targets = named[0] if named == ["all-linear"] else named
    options = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        return get_peft_model(model, options)
    except ValueError as error:
        raise UsageError(f"language_model.lora: {_line(error)}") from error


def _architecture(source: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=is_folder(source))
    except Exception as error:
        raise InputRefused(f"language_model.source={source} is no model that transformers knows: {_line(error)}") from error


def _pretrained(source: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": is_folder(source), "attn_implementation": "sdpa", "use_safetensors": True}
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except Exception as error:
        raise InputRefused(f"language_model.source={source} does not load as a causal language model: {_line(error)}") from error


def _empty(architecture: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation="sdpa")


def _llama(built: BuiltInConfig, tokenizer: Any, max_length: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=built.dim,
        intermediate_size=built.hidden,
        num_hidden_layers=built.depth,
        num_attention_heads=built.heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _fingerprint(source: str) -> dict[str, int]:
    """{name: bytes} of a folder's files; of a name nothing, the library keeps its own."""
    if not is_folder(source):
        return {}
    return {path.name: path.stat().st_size for path in sorted(Path(source).iterdir()) if path.is_file()}


@contextlib.contextmanager
def _local(uri: str) -> Iterator[str]:
    """A copy of a folder of a run on this machine, while the block runs."""
    with tempfile.TemporaryDirectory(prefix="jepa-language-model-") as local:
        for info in storage.list_files(uri):
            (Path(local) / info.uri.rpartition("/")[2]).write_bytes(storage.read_bytes(info.uri))
        yield local


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
