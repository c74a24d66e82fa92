"""jepa bench vidqa: questions about generated video, from pretraining to answers, and the controls that make them count.

Compared are language models trained on a pretrained encoder and on one with random weights, each also asked blind and before
shuffled frames. A stage that has its result is not done again, and trainings go on at their last checkpoint: the same command
continues a killed benchmark.

    run.dir/questions/   clips and questions (digit_questions.py)
    run.dir/catalogs/    of the clips
    run.dir/encoders/    pretraining runs, one a seed
    run.dir/align/       trained language models, one an arm and seed
    run.dir/answers/     evaluations, one an arm and number of seeds
"""

from dataclasses import replace
from typing import Any

from jepa_core.statistics import mean_interval
from pipelines import digit_questions, evaluate_table, evaluate_vidqa_table, ray_session, run_folder, storage
from pipelines.align_config import RANDOM
from pipelines.bench_stages import run_verb, stage
from pipelines.bench_vidqa_config import PRETRAIN, VidQABenchConfig
from pipelines.errors import ConditionMissed
from pipelines.evaluate_vidqa_table import BLIND, SHUFFLED
from pipelines.progress import Reporter

TRAINED, UNTRAINED = "pretrained", "random"
QUESTIONS, CATALOGS, ENCODERS, ALIGN, ANSWERS = "questions", "catalogs", "encoders", "align", "answers"


def run(config: VidQABenchConfig, reporter: Reporter) -> dict[str, Any]:
    """Generate, ingest, train, ask; what is finished is kept. Returns the margins.

    Raises ConditionMissed at the end where `require` and a margin is too small.
    """
    run_dir = storage.normalize(config.run.dir)
    config = replace(config, run=replace(config.run, dir=run_dir))
    if config.encoder != PRETRAIN:
        config = replace(config, encoder=storage.normalize(config.encoder))
    run_folder.claim(config.run, config)
    arms = (TRAINED, UNTRAINED) if config.control else (TRAINED,)
    with ray_session.session(config.ray):
        catalogs = _generated(config, run_dir, reporter)
        seconds = {(arm, seed): _trained(config, run_dir, arm, seed, catalogs, reporter)
                   for seed in range(config.seeds) for arm in arms}  # fmt: skip
        results = {arm: _asked(config, run_dir, arm, catalogs, reporter) for arm in arms}
    result = summary(results, config) | {"seconds": {f"{arm}-s{seed}": value for (arm, seed), value in seconds.items()}}
    run_folder.write_json(run_dir, run_folder.RESULT, result)
    for arm, found in results.items():
        reporter.table(f"jepa bench vidqa: {arm} encoder", *evaluate_vidqa_table.category_table(found))
    reporter.table("margins, points", *margins(result))
    missed = [line["what"] for line in result["conditions"] if not line["holds"]]
    if missed and config.require:
        raise ConditionMissed(f"{run_dir}: too small {', '.join(missed)}: see {run_folder.RESULT}, or set require=false")
    return {"run": run_dir, "passed": not missed, **{line["what"]: line["mean"] for line in result["conditions"]}}


def _generated(config: VidQABenchConfig, run_dir: str, reporter: Reporter) -> dict[str, str]:
    """{part: uri@version}, generated and ingested unless they were before."""
    made, folder = {}, storage.join(run_dir, QUESTIONS)

    def generate() -> dict[str, Any]:
        total = sum(getattr(config.questions, part) for part in digit_questions.PARTS)
        reporter.start("generate", total, "clips")
        digit_questions.write(config.questions, folder, reporter.advance)
        reporter.stop()
        return {"clips": total}

    stage(run_dir, "generate", generate)
    for part in ("train", "test"):
        words = [f"source={storage.join(folder, part)}", f"catalog={storage.join(run_dir, CATALOGS, part)}", "validate=none"]
        made[part] = stage(run_dir, f"ingest-{part}", lambda words=words: run_verb("ingest", words, reporter))["catalog"]
    return made


def _trained(config: VidQABenchConfig, run_dir: str, arm: str, seed: int, catalogs: dict[str, str], reporter: Reporter) -> float:
    """Train one language model, and its encoder where that is asked for. Returns seconds that the alignment took."""
    encoder = config.encoder
    if encoder == PRETRAIN:
        encoder = storage.join(run_dir, ENCODERS, f"s{seed}")
        words = [*config.pretrain, f"catalog={catalogs['train']}", f"seed={seed}", "train.num_workers=0", f"run.dir={encoder}"]
        stage(run_dir, f"pretrain-s{seed}", lambda: run_verb("pretrain", words, reporter))
    chosen = f"{RANDOM}{encoder}" if arm == UNTRAINED else encoder
    given = [*config.align, f"encoder={chosen}", f"catalog={catalogs['train']}"]
    for name, weight in zip(digit_questions.TRAINED, (1 - config.lettered, config.lettered), strict=True):
        if weight:
            uri = storage.join(run_dir, QUESTIONS, f"{name}.jsonl")
            given += [f"conversations.{name}.uri={uri}", f"conversations.{name}.weight={weight}"]
    given += [f"seed={seed}", "train.num_workers=0", f"run.dir={_align_dir(run_dir, arm, seed)}"]
    return stage(run_dir, f"align-{arm}-s{seed}", lambda: run_verb("align", given, reporter))["seconds"]


def _align_dir(run_dir: str, arm: str, seed: int) -> str:
    return storage.join(run_dir, ALIGN, f"{arm}-s{seed}")


def _asked(config: VidQABenchConfig, run_dir: str, arm: str, catalogs: dict[str, str], reporter: Reporter) -> dict[str, Any]:
    """The result of `jepa evaluate vidqa` on the models of an arm."""
    models = ",".join(_align_dir(run_dir, arm, seed) for seed in range(config.seeds))
    name = f"{arm}-{config.seeds}"  # more seeds are asked anew: their intervals are of all
    folder = storage.join(run_dir, ANSWERS, name)
    words = [f"model=[{models}]", f"catalog={catalogs['test']}", f"methods=[{','.join(config.methods)}]"]
    words += [f"questions={storage.join(run_dir, QUESTIONS, 'test.jsonl')}", f"run.dir={folder}"]
    stage(run_dir, f"answers-{name}", lambda: run_verb("evaluate vidqa", words, reporter))
    return run_folder.read_json(folder, run_folder.RESULT)


def summary(results: dict[str, dict[str, Any]], config: VidQABenchConfig) -> dict[str, Any]:
    """All that result.json holds, from the evaluations of the arms."""
    method = config.methods[0]
    mine = {line["category"]: line for line in results[TRAINED]["categories"] if line["probe"] == method}
    conditions = []
    for category in config.categories:
        for other in (BLIND, SHUFFLED):
            margin = mine[category]["margins"][other]
            conditions.append(_condition(f"{category} over {other}", margin["values"], config.least))
    beside = []
    if UNTRAINED in results:
        theirs = {line["category"]: line for line in results[UNTRAINED]["categories"] if line["probe"] == method}
        for category, line in mine.items():
            pairs = zip(line["video"]["values"], theirs[category]["video"]["values"], strict=True)
            beside.append(_condition(f"{category} over a random encoder", [a - b for a, b in pairs], None))
    return {"method": method, "conditions": conditions, "reported": beside, "arms": results}


def _condition(what: str, margins_: list[float], least: float | None) -> dict[str, Any]:
    """Margins of each seed, shares, as points."""
    points = [100 * value for value in margins_]
    found = mean_interval(points) if len(points) > 1 else None
    mean = sum(points) / len(points)
    ends = {"low": found and found.low, "high": found and found.high}
    return {"what": what, "mean": mean, **ends, "least": least, "holds": least is None or mean >= least}


def margins(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows for the reporter's table."""
    rows = [
        (
            line["what"],
            evaluate_table.shown({key: line[key] if line[key] is None else line[key] / 100 for key in ("mean", "low", "high")}),
            "-" if line["least"] is None else line["least"],
            "-" if line["least"] is None else "yes" if line["holds"] else "NO",
        )
        for line in (*result["conditions"], *result["reported"])
    ]
    return ("margin", "measured", "at least", "holds"), rows
