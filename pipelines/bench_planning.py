"""jepa bench planning: record, pretrain or take an encoder, post-train, plan in closed loop, with what makes the numbers count.

For each task, a JEPA world model plays the same scenes as doing nothing, random actions, a world model of principal components
and a small network under the same planner, and an oracle. A task is a folder below `run.dir`; a stage and an episode that have
their result are not done again: the same command continues a killed benchmark.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from jepa_core.config import PlannerConfig
from pipelines import bench_planning_table, closed_loop, presets, ray_session, run_folder, storage
from pipelines.bench_planning_config import PRETRAIN, UNTRAINED, PlanningBenchConfig, tasks_of
from pipelines.bench_planning_table import BASELINE, ECONOMICAL, JEPA, NOTHING, ORACLE, RANDOM
from pipelines.bench_stages import STAGES, run_verb, stage
from pipelines.closed_loop import Agent, Arena
from pipelines.config import PostTrainConfig, PretrainConfig
from pipelines.errors import ConditionMissed, UsageError
from pipelines.progress import Reporter

CHECKPOINT_GRID = 32
"""Checkpoints that post-training commits; those that are scored lie closer together where the model still changes much."""


def run(config: PlanningBenchConfig, reporter: Reporter) -> dict[str, Any]:
    """All stages of all tasks; what is finished is kept. Returns success and final error of the main rows.

    Raises ConditionMissed at the end where `require` and the reach of the JEPA model is not better than the baseline's.
    """
    run_dir = storage.normalize(config.run.dir)
    config = replace(config, run=replace(config.run, dir=run_dir))
    if config.encoder not in (PRETRAIN, UNTRAINED):
        config = replace(config, encoder=storage.normalize(config.encoder))
    run_folder.claim(config.run, config)
    results = {}
    with ray_session.session(config.ray):
        for task in tasks_of(config):
            results[task] = _run_task(config, task, storage.join(run_dir, task), reporter)
            run_folder.write_json(run_dir, run_folder.RESULT, {"success_distance": config.success_distance, "tasks": results})
    told: dict[str, Any] = {"run": run_dir}
    for task, result in results.items():
        _show(task, result, config, reporter)
        told |= bench_planning_table.told(task, result)
    missed = [line["what"] for result in results.values() for line in result["conditions"] if not line["holds"]]
    if missed and config.require:
        raise ConditionMissed(f"{run_dir}: {'; '.join(missed)}: see {run_folder.RESULT}, or set require=false")
    return {**told, "passed": not missed}


def _show(task: str, result: dict[str, Any], config: PlanningBenchConfig, reporter: Reporter) -> None:
    within = f"within {config.success_distance * 100:g} cm"
    reporter.table(f"jepa bench planning task={task}: {within}, 95 % intervals", *bench_planning_table.agents(result))
    reporter.table(f"{task}: paired differences of the same scenes", *bench_planning_table.differences(result))
    if result["checkpoints"]:
        reporter.table(f"{task}: offline scores beside the closed loop", *bench_planning_table.checkpoints(result))
    if result["conditions"]:
        reporter.table(f"{task}: conditions", *bench_planning_table.conditions(result))


def _run_task(config: PlanningBenchConfig, task: str, folder: str, reporter: Reporter) -> dict[str, Any]:
    trained = _train(config, task, folder, reporter)
    from pipelines import bench_offline  # imports ray, which the session has to start first

    post_train, baseline = storage.join(folder, "post-train"), storage.join(folder, "baseline")
    trained["baseline"] = stage(folder, "baseline", lambda: bench_offline.fit_baseline(post_train, baseline, config.baseline))
    fps = run_folder.config_of(post_train, PostTrainConfig, "post-training").fps
    arena = Arena(task, config.steps, config.seed, config.success_distance, config.sim, config.planner.max_step, fps)
    newest = run_folder.require_checkpoint(post_train)
    agents = _agents(config, newest.uri, baseline)
    found = {checkpoint.step: checkpoint.uri for checkpoint in run_folder.checkpoints(post_train)}
    steps = chosen_steps(list(found), config.checkpoints) if config.checkpoints else []
    names = {step: JEPA if step == newest.step else f"checkpoint-{step:08d}" for step in steps}  # the newest plays anyway
    agents += [
        Agent(names[step], "jepa", found[step], config.planner, episodes=config.checkpoint_episodes)
        for step in steps
        if step != newest.step
    ]
    where = storage.join(folder, closed_loop.PLAYED)
    played = closed_loop.play_all(arena, agents, config.episodes, folder, where, reporter)
    uris = {step: found[step] for step in steps}
    scores = bench_offline.score_all(uris, config.planner, storage.join(folder, STAGES), config.seed, reporter)
    few = {step: played[names[step]][: config.checkpoint_episodes] for step in steps}
    lines = [{"step": step, **scores[step], **bench_planning_table.closed(few[step])} for step in steps]
    shown = {name: episodes for name, episodes in played.items() if name == JEPA or name not in names.values()}
    planners = {agent.name: agent.planner for agent in agents if agent.model}
    told = bench_planning_table.summary(task, shown, planners, lines)
    return {**told, "stages": trained, "films": storage.join(folder, closed_loop.FILMS)}


def _agents(config: PlanningBenchConfig, model: str, baseline: str) -> list[Agent]:
    """The rows of the table."""
    agents = [Agent(JEPA, "jepa", model, config.planner, filmed=True)]
    if (economical := economical_planner(config)) is not None:
        agents.append(Agent(ECONOMICAL, "jepa", model, economical, warm_start=True))
    agents += [Agent(BASELINE, "pca-mlp", baseline, config.planner), Agent(RANDOM, "random"), Agent(NOTHING, "no-op")]
    return [*agents, Agent(ORACLE, "oracle")]


def economical_planner(config: PlanningBenchConfig) -> PlannerConfig | None:
    """The planner of `jepa plan preset=economical`, with the longest step of this; None where it is not wanted, or missing."""
    if not config.economical or "economical" not in presets.preset_names("plan"):
        return None
    tree = presets.read_preset("plan", "economical").get("planner", {})
    planner = presets.from_tree(PlannerConfig, tree, "preset economical")
    return replace(planner, max_step=config.planner.max_step, max_gripper=config.planner.max_gripper)


def _train(config: PlanningBenchConfig, task: str, folder: str, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Everything up to the post-trained model. Returns what each stage told."""
    trajectories = storage.join(folder, "trajectories")
    encoder = config.encoder if config.encoder not in (PRETRAIN, UNTRAINED) else storage.join(folder, config.encoder)
    told = {"record": stage(folder, "record", lambda: run_verb("record", record_words(config, task, trajectories), reporter))}
    if config.encoder == PRETRAIN:
        catalog = storage.join(folder, "catalog")
        ingest = [f"source={trajectories}", f"catalog={catalog}"]
        told["ingest"] = stage(folder, "ingest", lambda: run_verb("ingest", ingest, reporter))
        words = [*config.pretrain, f"catalog={catalog}", f"run.dir={encoder}"]
        told["pretrain"] = stage(folder, "pretrain", lambda: run_verb("pretrain", words, reporter))
    elif config.encoder == UNTRAINED:
        words = [*config.pretrain, "catalog=none", f"run.dir={encoder}"]
        told["encoder"] = stage(folder, "encoder", lambda: _untrained(words, encoder))
    words = post_train_words(config, trajectories, encoder, storage.join(folder, "post-train"))
    told["post-train"] = stage(folder, "post-train", lambda: run_verb("post-train", words, reporter))
    return told


def record_words(config: PlanningBenchConfig, task: str, trajectories: str) -> list[str]:
    """Arguments of `jepa record`: what the benchmark plays in is what was recorded."""
    sim = [f"sim.{key}={value}" for key, value in asdict(config.sim).items()]
    return [f"play={'random' if task == 'reach' else 'mixed'}", *config.record, *sim, f"task={task}", f"out={trajectories}"]


def post_train_words(config: PlanningBenchConfig, trajectories: str, encoder: str, run_dir: str) -> list[str]:
    """Arguments of `jepa post-train`, which keeps a grid of checkpoints."""
    words = [*config.post_train, f"trajectories={trajectories}", f"encoder={encoder}", f"run.dir={run_dir}"]
    if config.checkpoints:
        trained = presets.load(PostTrainConfig, "post-train", words)
        if config.planner.horizon >= trained.num_frames:
            raise UsageError(
                f"planner.horizon={config.planner.horizon} looks beyond post-training's clips of {trained.num_frames} frames, "
                "so checkpoints cannot be scored by it: give checkpoints=0, or num_frames in post_train"
            )
        steps = trained.train.steps
        words += [f"train.checkpoint_every={max(1, steps // CHECKPOINT_GRID)}", f"train.keep_checkpoints={2 * CHECKPOINT_GRID}"]
    return words


def _untrained(words: Sequence[str], uri: str) -> dict[str, Any]:
    """A model folder of an encoder with the weights that pretraining would have started from."""
    import torch

    from jepa_core.encoder import VisionTransformer
    from jepa_core.weights import ENCODER, ModelConfig
    from pipelines import model_folder

    config = presets.load(PretrainConfig, "pretrain", words)
    torch.manual_seed(config.seed)
    state = VisionTransformer(config.model.encoder).state_dict()
    clip = model_folder.ClipFormat(config.clip.num_frames, config.clip.crop_size, config.clip.fps)
    if not model_folder.is_model(uri):
        source = {"untrained": True, "seed": config.seed}
        model_folder.write(
            model_folder.ModelFolder(ModelConfig(encoder=config.model.encoder), {ENCODER: state}, {}, clip, source), uri
        )
    return {"encoder": uri}


def chosen_steps(steps: Sequence[int], count: int) -> list[int]:
    """`count` of these steps, or all of fewer: the last, and those nearest to halving it again and again."""
    wanted = [max(steps) / 2**power for power in range(count)]
    found: list[int] = []
    for target in wanted:
        left = [step for step in steps if step not in found]
        if left:
            found.append(min(left, key=lambda step: abs(step - target)))
    return sorted(found)
