"""A language model that sees: projector and causal model as one module, and the same after training, to be asked.

Legend: B clips, N tokens of the encoder, D its width, V values of a tubelet, Q visual tokens of a clip, L width of the language
model, n tokens or visual tokens in all, R rows of S tokens.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.config import ClipConfig, EncoderConfig, ProjectorConfig
from jepa_core.encoder import VisionTransformer, clip_grid
from jepa_core.health import CLIPS, FEATURES, HEALTH_TOKENS, SAMPLE_LOSS
from jepa_core.positions import Grid
from jepa_core.projector import Projector
from pipelines import causal_model, chat, run_folder, storage
from pipelines.align_config import AlignConfig
from pipelines.chat import IGNORED, PLACEHOLDER, TEXT, Chat, Encoded
from pipelines.errors import InputRefused
from pipelines.post_train import load_frozen_encoder

PROJECTOR, LANGUAGE, ENCODER = "projector", "lm", "encoder"
"""Children of the module, and the files of a checkpoint that hold what was trained of them."""
SCORED = 16
"""Rows of one forward pass when choices are scored."""


class Language(nn.Module):
    """A causal model that is given some inputs as vectors. One module, so that FSDP gathers embeddings with its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        named = inspect.signature(_plain(model).forward).parameters
        self.keeps = "logits_to_keep" in named
        self.positions = "position_ids" in named

    def forward(self, ids: Tensor, visual: Tensor, where: Tensor, sample: Tensor, position: Tensor, keep: Tensor) -> Tensor:
        """Packed rows -> float32 logits [R, K, words] of the columns `keep` [K]; see chat.Packed for the rows [R, S].

        `visual` [n, L] are the vectors that `where` counts. A token sees those before it of its own `sample`.
        """
        same = sample[:, None, :, None] == sample[:, None, None, :]
        seen = same & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        options: dict[str, Any] = {"position_ids": position} if self.positions else {}
        if self.keeps:
            options["logits_to_keep"] = keep
        embedded = self.embed(ids, visual, where)
        logits = self.model(inputs_embeds=embedded, attention_mask=seen, use_cache=False, **options).logits
        return (logits if self.keeps else logits[:, keep]).float()

    def embed(self, ids: Tensor, visual: Tensor, where: Tensor) -> Tensor:
        """What the model reads: where `where` is TEXT the vector of the word in ids [R, S], else that row of visual [n, L]
        -> [R, S, L].
        """
        words = self.model.get_input_embeddings()(ids)
        if not len(visual):
            return words
        return torch.where((where == TEXT).unsqueeze(-1), words, visual.to(words.dtype)[where.clamp_min(0)])

    @property
    def width(self) -> int:
        """L: of the vectors that it reads."""
        return self.model.get_input_embeddings().weight.shape[-1]


class VideoLanguageModel(nn.Module):
    """Projector and language model, with the loss as forward; the encoder too where it is trained."""

    def __init__(
        self, lm: nn.Module, config: ProjectorConfig, encoder: EncoderConfig, grids: tuple[Grid, Grid],
        trained: VisionTransformer | None = None,
    ) -> None:  # fmt: skip
        """`grids` of a still image and of a video; `trained` is an encoder that learns with the rest."""
        super().__init__()
        self.grids = grids
        self.lm = Language(lm)
        try:
            self.projector = Projector(config, encoder.dim, self.lm.width)
        except ValueError as error:
            raise InputRefused(f"projector: {error}") from error
        if trained is not None:
            self.encoder = trained

    def project(self, tokens: Tensor, *, still: bool) -> Tensor:
        """Tokens of the encoder [B, N, D] -> visual tokens [B, Q, L]."""
        return self.projector(tokens, self.grids[0 if still else 1])

    def embed(self, ids: Tensor, visual: Tensor, where: Tensor) -> Tensor:
        """See Language.embed: ids [R, S], visual [n, L], where [R, S] -> [R, S, L]."""
        return self.lm.embed(ids, visual, where)

    def _visual(self, media: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(visual tokens [n, L] of images and then of videos, the same by kind)."""
        found, nothing = [], torch.zeros((), device=media[0].device)
        for shown, grid in zip(media, self.grids, strict=True):
            # Every worker runs both kinds, shown or not: sharded weights are gathered, and gradients awaited, by all or none.
            tokens = shown if len(shown) else shown.new_zeros(1, *shown.shape[1:])
            tokens = self.encoder(tokens, grid) if hasattr(self, ENCODER) else tokens
            visual = self.projector(tokens.float() if tokens.dtype == torch.float16 else tokens, grid)
            if len(shown):
                found.append(visual)
            else:
                nothing = nothing + 0 * visual.sum()
        found = found or [visual * 0]
        found[0] = found[0] + nothing
        return torch.cat([visual.flatten(0, 1) for visual in found]), found

    def forward(
        self, rows: Tensor, media: Sequence[Tensor], conversations: int, measure: bool = True
    ) -> tuple[Tensor, dict[str, Any]]:
        """(cross-entropy of the answers' tokens, numbers to log).

        `rows` int64 [5, R, S] are the fields of chat.Packed, `media` the tokens [B, N, D] (tubelets [B, N, V] where the encoder
        is trained) of the unit's images and of its videos. With `measure`, the loss is also taken with another clip's tokens.
        """
        ids, target, sample, position, where = rows
        visual, kinds = self._visual(media)
        keep = (target != IGNORED).any(dim=0).nonzero().squeeze(-1)
        wanted = target[:, keep]

        def losses(vectors: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.lm(ids, vectors, where, sample, position, keep)
            return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"), logits

        each, logits = losses(visual)
        answers = wanted.flatten() != IGNORED
        loss = each.sum() / answers.sum()
        owner = sample[:, keep].flatten()[answers].long()
        per = each.detach()[answers]
        total, count = (per.new_zeros(conversations).index_add(0, owner, one) for one in (per, torch.ones_like(per)))
        numbers: dict[str, Any] = {SAMPLE_LOSS: total / count.clamp_min(1), "answer_tokens": answers.sum() / conversations}
        numbers[CLIPS] = torch.cat([one.detach().float().mean(dim=1) for one in kinds])
        if measure:
            right = logits.flatten(0, 1).argmax(-1)[answers] == wanted.flatten()[answers]
            other = torch.cat([one.detach().roll(1, dims=0).flatten(0, 1) for one in kinds])
            with torch.no_grad():
                numbers["loss_other_video"] = losses(other)[0].sum() / answers.sum()
            numbers |= {"token_accuracy": right.float().mean(), "row_fill": (sample >= 0).float().mean()}
            numbers[FEATURES] = visual.detach()[:: max(1, len(visual) // HEALTH_TOKENS)][:HEALTH_TOKENS]
        return loss, numbers


class Prompt(NamedTuple):
    """A question, after the turns that went before it."""

    turns: list[tuple[str, str]]
    """(role, text): human or user, gpt or assistant, system. <image> or <video> stands where something is shown."""
    visual: Tensor | None
    """[n, L] of all that is shown, in order; None: nothing is, and the placeholder is dropped."""


class Scores(NamedTuple):
    """Log-likelihoods of the choices of one question, end of the answer included."""

    total: list[float]
    per_token: list[float]


class Answerer:
    """A trained model that answers; made by `load_video_language_model`."""

    def __init__(
        self, model: VideoLanguageModel, encoder: VisionTransformer, talk: Chat, clip: ClipConfig, max_length: int
    ) -> None:
        self.model, self.encoder, self.chat, self.clip, self.max_length = model.eval(), encoder.eval(), talk, clip, max_length
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def encode(self, frames: Tensor | None) -> Tensor | None:
        """uint8 tubelets [B, N, V], of videos or of stills, -> visual tokens [B, Q, L]; None for None."""
        if frames is None:
            return None
        still = frames.shape[-1] == 3 * self.encoder.config.patch_size**2 and self.encoder.config.tubelet_size > 1
        still = still or frames.shape[1] != self.model.grids[1].num_tokens
        return self.project(self.encoder(frames.to(self.device), self.model.grids[0 if still else 1]), still=still)

    @torch.no_grad()
    def project(self, tokens: Tensor, *, still: bool = False) -> Tensor:
        """Tokens of the encoder [B, N, D], e.g. cached ones, -> visual tokens [B, Q, L]."""
        return self.model.project(tokens.to(self.device).float(), still=still)

    @torch.no_grad()
    def score(self, questions: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[Scores]:
        """How likely the model is to give each choice as its answer."""
        rows = [
            (Prompt([*prompt.turns, (chat.ASSISTANT, choice)], prompt.visual))
            for prompt, options in zip(questions, choices, strict=True)
            for choice in options
        ]
        found: list[tuple[float, float]] = []
        for start in range(0, len(rows), SCORED):
            found += self._likelihoods(rows[start : start + SCORED])
        each = iter(found)
        told = [[next(each) for _ in options] for options in choices]
        return [Scores([total for total, _ in one], [mean for _, mean in one]) for one in told]

    def _likelihoods(self, rows: Sequence[Prompt]) -> list[tuple[float, float]]:
        encoded = [self._encoded(row, answered=True) for row in rows]
        length = max(len(one.ids) for one, _ in encoded)
        ids, target, sample, position, where = (
            torch.full((len(rows), length), fill, dtype=torch.long) for fill in (0, IGNORED, -1, 0, TEXT)
        )
        vectors, shown = [torch.empty(0, self.model.lm.width, device=self.device)], 0
        for row, (one, visual) in enumerate(encoded):
            size = len(one.ids)
            ids[row, :size] = torch.from_numpy(one.ids)
            last = _last_run(torch.from_numpy(one.answer))
            target[row, : size - 1][last[1:]] = ids[row, 1:size][last[1:]]
            sample[row, :size], position[row, :size] = row, torch.arange(size)
            mark = torch.from_numpy(one.visual).long()
            where[row, :size] = torch.where(mark == TEXT, TEXT, mark + shown)
            if visual is not None:
                vectors.append(visual.to(self.device))
                shown += len(visual)
        keep = (target != IGNORED).any(dim=0).nonzero().squeeze(-1)
        inputs = (one.to(self.device) for one in (where, sample, position, keep))
        logits = self.model.lm(ids.to(self.device), torch.cat(vectors), *inputs)
        wanted = target[:, keep].to(self.device)
        told = -F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
        counts = (wanted != IGNORED).sum(1)
        return list(zip(told.sum(1).tolist(), (told.sum(1) / counts).tolist(), strict=True))

    @torch.no_grad()
    def generate(self, questions: Sequence[Prompt], max_new_tokens: int = 32) -> list[str]:
        """The likeliest answers, word by word (greedy)."""
        encoded = [self._encoded(prompt, answered=False) for prompt in questions]
        answers: list[str] = []
        for start in range(0, len(encoded), SCORED):
            part = encoded[start : start + SCORED]
            length = max(len(one.ids) for one, _ in part)
            embedded = torch.zeros(len(part), length, self.model.lm.width, device=self.device)
            mask = torch.zeros(len(part), length, dtype=torch.long, device=self.device)
            for row, (one, visual) in enumerate(part):  # padded on the left, so that all answers begin in one column
                ids, where = (torch.from_numpy(part).long()[None].to(self.device) for part in (one.ids, one.visual))
                vectors = torch.empty(0, self.model.lm.width) if visual is None else visual
                embedded[row, length - len(one.ids) :] = self.model.embed(ids, vectors.to(self.device), where)[0]
                mask[row, length - len(one.ids) :] = 1
            dtype = self.model.lm.model.get_input_embeddings().weight.dtype
            found = self.model.lm.model.generate(
                inputs_embeds=embedded.to(dtype), attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens,
                pad_token_id=self.chat.tokenizer.pad_token_id, eos_token_id=sorted(self.chat.stops), use_cache=True,
            )  # fmt: skip
            answers += [self.chat.decode(row) for row in found.tolist()]
        return answers

    def _encoded(self, prompt: Prompt, *, answered: bool) -> tuple[Encoded, Tensor | None]:
        turns = [(chat.ROLES[role], text) for role, text in prompt.turns]
        if prompt.visual is None:
            one = self.chat.encode(chat.without_placeholders(turns))
        else:
            marks = sum(len(PLACEHOLDER.findall(text)) for role, text in turns if role != chat.ASSISTANT)
            turns = turns if marks else chat.with_placeholders(turns, ["video"])
            share, left = divmod(len(prompt.visual), max(1, marks))
            if left:
                raise InputRefused(f"{len(prompt.visual)} visual tokens do not divide among {marks} placeholders")
            one = self.chat.encode(turns, [share] * max(1, marks))
        if len(one.ids) > self.max_length:
            raise InputRefused(f"a question of {len(one.ids)} tokens is longer than language_model.max_length={self.max_length}")
        return one, prompt.visual


def _last_run(answer: Tensor) -> Tensor:
    """The last stretch of True of a bool [n]: bool [n]."""
    places = answer.nonzero().squeeze(-1)
    end = places[-1].item()
    gaps = (~answer[:end]).nonzero().squeeze(-1)
    begin = gaps[-1].item() + 1 if len(gaps) else 0
    found = torch.zeros_like(answer)
    found[begin : end + 1] = True
    return found


def load_video_language_model(uri: str, device: str = "cpu") -> Answerer:
    """The model of a finished or running run of `jepa align`, or of one of its checkpoints. Raises InputRefused for another."""
    causal_model.check_installed()
    encoder, clip, config, checkpoint = load_seeing_encoder(uri)
    model = build(config, encoder.config, clip, None, train=False)
    model.projector.load_state_dict(run_folder.load_weights(checkpoint, PROJECTOR))
    if storage.exists(storage.join(checkpoint.uri, f"{LANGUAGE}.safetensors")):
        causal_model.take_trained(model.lm, run_folder.load_weights(checkpoint, LANGUAGE), checkpoint.uri)
    talk = causal_model.open_chat(config.run.dir)
    return Answerer(model.to(device), encoder.to(device), talk, clip, config.language_model.max_length)


class Seeing(NamedTuple):
    """The part of a trained model that looks."""

    encoder: VisionTransformer
    clip: ClipConfig
    config: AlignConfig
    checkpoint: run_folder.Checkpoint


def load_seeing_encoder(uri: str) -> Seeing:
    """The encoder of a run of `jepa align` or of one of its checkpoints, as tuned there, without the language model."""
    at = run_folder.checkpoint_at(uri)
    run_dir, checkpoint = at or (storage.normalize(uri), None)
    config = run_folder.config_of(run_dir, AlignConfig, "video-language")
    config = replace(config, run=replace(config.run, dir=run_dir))  # the folder may have been moved
    checkpoint = checkpoint or run_folder.require_checkpoint(run_dir)
    encoder, source = load_frozen_encoder(run_dir)
    if storage.exists(storage.join(checkpoint.uri, f"{ENCODER}.safetensors")):
        encoder.load_state_dict(run_folder.load_weights(checkpoint, ENCODER))
    return Seeing(encoder, config.clip_of(source.clip), config, checkpoint)


def build(
    config: AlignConfig, encoder: EncoderConfig, clip: ClipConfig, trained: VisionTransformer | None, *, train: bool
) -> VideoLanguageModel:
    """The module of a run, before its checkpoints."""
    torch.manual_seed(config.seed)  # of adapters
    lm = causal_model.open_model(config.language_model, config.run.dir, train=train and config.train_parts != "projector")
    torch.manual_seed(config.seed)  # of the projector, whatever a library drew while it built the language model
    return VideoLanguageModel(lm, config.projector, encoder, grids_of(clip, encoder), trained)


def grids_of(clip: ClipConfig, encoder: EncoderConfig) -> tuple[Grid, Grid]:
    """Tokens along time, height and width of a still image and of a video. Raises InputRefused where the clip does not fill
    them.
    """
    try:
        still = ClipConfig(num_frames=1, fps=clip.fps, crop_size=clip.crop_size)
        return clip_grid(still, encoder), clip_grid(clip, encoder)
    except ValueError as error:
        raise InputRefused(f"num_frames and crop_size: {error}") from error


def _plain(model: nn.Module) -> nn.Module:
    """The causal model itself, without what peft wraps around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
