"""jepa evaluate masks: a contact sheet of what a pretraining preset hides of real clips, with the effective ratios; no model.

run.dir/masks.png, run.dir/result.json
"""

from typing import Any

from pipelines import run_folder, storage
from pipelines.errors import UsageError
from pipelines.progress import Reporter
from pipelines.seeing_config import MaskPicturesConfig

PICTURE = "masks.png"


def run(config: MaskPicturesConfig, reporter: Reporter) -> dict[str, Any]:
    """Draw masks over clips of the first steps, as the training of this preset will. Returns where the picture is.

    Raises InputRefused for a catalog without videos, UsageError for masks that do not fit the clip.
    """
    from pipelines import mask_pictures, pretrain

    config = pretrain.pinned(config)
    storage.check_bucket(config.run.dir)
    try:
        ratios = mask_pictures.effective_ratios(config, config.measured_steps)
        shown = list(mask_pictures.examples(config, config.clips))
    except ValueError as error:
        raise UsageError(f"model.masks: {error}") from error
    picture = storage.join(config.run.dir, PICTURE)
    storage.write_bytes(picture, mask_pictures.sheet(shown, config))
    samples = [{"sample": example.sample, "uri": example.uri, "ratios": example.ratios} for example in shown]
    result = {"task": "masks", "masks": ratios, "steps": config.measured_steps, "shown": samples}
    run_folder.write_json(config.run.dir, run_folder.RESULT, result)
    rows = [
        (
            f"{row['mask'] + 1}",
            row["num_frames"],
            "x".join(map(str, row["grid"])),
            *(_shown(row[name]) for name in ("context", "target")),
        )
        for row in ratios
    ]
    reporter.table("effective ratios, % of a clip's tubelets", ("mask", "frames", "grid", "context", "target"), rows)
    return {"run": config.run.dir, "picture": picture, "clips": len(shown)}


def _shown(measured: dict[str, float]) -> str:
    return f"{100 * measured['mean']:.1f} [{100 * measured['least']:.1f}, {100 * measured['largest']:.1f}]"
