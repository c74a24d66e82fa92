"""Jobs without a cluster: their names, attempts and ends, windows of time, Kubernetes by its API and by kubectl, schedules."""

import json
import os
import shlex
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import jepa

from cluster import kube, schedule, submission, windows
from cluster.ray_jobs import RayJobs
from cluster.submission import State
from pipelines import cli, presets
from pipelines.cluster_config import ScheduleConfig, SubmitConfig
from pipelines.errors import ConditionMissed, InputRefused, JepaError, Retryable, UsageError

INGEST = ["ingest", "source=s3://a/b", "catalog=s3://a/c"]


def job(*command: str, **options):
    return submission.job_of(SubmitConfig(list(command or INGEST), **options))


def test_the_name_is_that_of_the_configuration():
    assert job().name == job(INGEST[0], *reversed(INGEST[1:])).name
    assert job().name == job(*INGEST, "validate=sample").name  # the default, written out
    assert job().name != job(*INGEST, "validate=full").name
    smoke = ("pretrain", "preset=demo", "catalog=a", "run.dir=b")
    assert job(*smoke).name != job(*smoke, "smoke=true").name
    longest = job(
        "evaluate", "anticipation", "model=m", "catalog=c", "train=t", "validation=v", "run.dir=r", window="2026-11-22t03"
    )
    assert len(submission.name_of(longest.name, 99)) <= submission.LONGEST_NAME
    assert longest.name.endswith("-2026-11-22t03")


def test_code_of_a_folder_is_part_of_the_name(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    first = job(working_dir=str(tmp_path)).name
    assert first != job().name
    (tmp_path / "notes.txt").write_text("of no meaning")
    assert job(working_dir=str(tmp_path)).name == first
    (tmp_path / "a.py").write_text("x = 2")
    assert job(working_dir=str(tmp_path)).name != first
    with pytest.raises(UsageError, match="is no folder"):
        job(working_dir=str(tmp_path / "none"))


def test_the_entrypoint_is_what_a_user_would_type_there():
    assert job().entrypoint == "jepa ingest source=s3://a/b catalog=s3://a/c ray.address=auto"
    assert job("catalog", "show", "s3://a/b c").entrypoint == "jepa catalog show 's3://a/b c'"
    assert job(*INGEST, working_dir=str(Path(__file__).parent.parent / "cluster")).entrypoint.startswith(
        "python -m pipelines.cli ingest "
    )
    words = shlex.split(job(*INGEST, window="2026-11-22").entrypoint)
    assert cli.checked_command(words[1:])[2].run.startswith("2026-11-22-"), "of its window and its source"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([*INGEST, "ray.address=h:1"], "ray.address is set by jepa submit"),
        (["pretrain", "preset=mine.yaml", "catalog=a", "run.dir=b"], "preset=mine.yaml"),
        (["submit", *INGEST], "cannot itself be a job"),
        (["evaluate"], "first word of several verbs"),
        (["ingest", "sourze=a", "catalog=b"], "did you mean source"),
        ([], "command is missing"),
    ],
)
def test_commands_that_cannot_be_meant_are_refused(command, sentence):
    with pytest.raises(UsageError, match=sentence):
        words = cli.overrides(cli.VERBS["submit"], ["address=http://h:1", *command])
        submission.job_of(presets.load(SubmitConfig, "submit", words))


@pytest.mark.parametrize(
    "words",
    [
        "address=h:1",
        "address=http://user:pass@h:1",
        "address=http://h:1 retries=-1",
        "address=http://h:1 window=Day",
        "address=http://h:1 out=a.yaml",
        "target=kuberay",
        "target=kuberay pod.image=i working_dir=.",
    ],
)
def test_options_that_cannot_be_meant_are_refused(words, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(UsageError) as refused:
        presets.load(SubmitConfig, "submit", cli.overrides(cli.VERBS["submit"], [*words.split(), *INGEST]))
    assert "pass@" not in str(refused.value)


class Jobs:
    """A cluster in memory."""

    def __init__(self, **states: State) -> None:
        self.jobs = {name.replace("_", "-"): state for name, state in states.items()}
        self.rival: str = ""

    def states(self, prefix):
        return {name: state for name, state in self.jobs.items() if name.startswith(prefix)}

    def start(self, name, job):
        if self.rival:
            self.jobs[name], self.rival = State("running"), ""
        new = name not in self.jobs
        self.jobs.setdefault(name, State("running"))
        return new


@pytest.mark.parametrize(
    ("before", "again", "expected"),
    [
        ({}, False, ("", True)),
        ({"": State("running")}, False, ("", False)),
        ({"": State("succeeded", 0)}, False, ("", False)),
        ({"": State("succeeded", 0)}, True, ("-try2", True)),
        ({"": State("failed", 3)}, False, ("-try2", True)),
        ({"": State("stopped"), "-try2": State("waiting")}, False, ("-try2", False)),
        ({"": State("failed", 1), "-try9": State("failed", 1), "-try10": State("failed", 1)}, False, ("-try11", True)),
        ({"-other": State("running"), "x-try7": State("running")}, False, ("", True)),
    ],
)
def test_a_second_submit_attaches_or_makes_another_attempt(before, again, expected):
    name = job().name
    backend = Jobs()
    backend.jobs = {name + suffix: state for suffix, state in before.items()}
    assert submission.begin(backend, job(), again=again) == (name + expected[0], expected[1])


def test_of_two_at_once_the_later_one_attaches_even_when_asked_to_run_again():
    backend = Jobs()
    backend.jobs, backend.rival = {job().name: State("succeeded", 0)}, "quicker"
    assert submission.begin(backend, job(), again=True) == (f"{job().name}-try2", False)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (State("failed", 2), UsageError),
        (State("failed", 3), InputRefused),
        (State("failed", 4), ConditionMissed),
        (State("failed", 75), Retryable),
        (State("failed", 1), JepaError),
        (State("failed", 130), Retryable),
        (State("failed", -9), Retryable),
        (State("failed", 137), Retryable),
        (State("failed", None, "its node is gone"), Retryable),
        (State("stopped"), Retryable),
    ],
)
def test_the_end_of_a_job_is_the_end_of_its_submit(state, kind):
    with pytest.raises(JepaError) as ended:
        submission.end("j", state)
    assert type(ended.value) is kind
    assert state.as_dict()["retry"] == (kind is Retryable)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("rule", "now", "name"),
    [
        ("day@03:00", "2026-11-22T03:00:00", "2026-11-22"),
        ("day@03:00", "2026-11-22T02:59:59", "2026-11-21"),  # of the window before, started late
        ("day@23:30", "2026-11-23T00:10:00", "2026-11-22"),
        ("hour@00:15", "2026-11-22T03:14:00", "2026-11-22t02"),
        ("hour@00:15", "2026-11-22T03:15:00", "2026-11-22t03"),
        ("week@00:00", "2026-12-31T12:00:00", "2026-w53"),
        ("week@12:00", "2027-01-04T11:59:00", "2026-w53"),
        ("2026-11-01", "2026-11-22T03:00:00", "2026-11-01"),
    ],
)
def test_a_window_is_named_by_the_time_at_which_it_began(rule, now, name):
    assert windows.name_of(rule, at(now)) == name


def test_cron_ticks_exactly_when_a_window_begins():
    assert (windows.cron("hour", "00:15"), windows.cron("day", "03:30"), windows.cron("week", "03:30")) == (
        "15 * * * *", "30 3 * * *", "30 3 * * 1")  # fmt: skip
    for every in windows.PERIODS:
        began = windows.start_of(every, "03:30", at("2026-11-22T03:29:00"))
        assert began.minute == 30
        assert windows.start_of(every, "03:30", began) == began
        assert schedule.START_WITHIN[every] < windows.PERIODS[every].total_seconds()
    assert windows.start_of("week", "03:30", at("2026-11-22T03:29:00")).weekday() == 0


class Server:
    """An HTTP server whose answers a test gives: {(method, path): (code, body)}; what it was asked is kept."""

    def __init__(self, answers) -> None:
        server = self
        self.asked: list[tuple[str, str, dict | None, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
                server.asked.append((self.command, self.path, body, self.headers.get("Authorization", "")))
                code, given = answers(self.command, self.path, body) if callable(answers) else answers[self.command, self.path]
                data = given.encode() if isinstance(given, str) else json.dumps(given).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *_) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


VERSION = {"ray_version": "2.60.0", "version": "4", "ray_commit": "", "session_name": ""}


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (200, json.dumps({"submission_id": "j", "job_id": "j"}), None),
        (400, "Traceback ...\nValueError: bad label", UsageError),
        (401, "no token", UsageError),
        (403, "other token", UsageError),
        (404, "no such page", UsageError),
        (500, "Traceback ...\nRuntimeError: GCS is away", Retryable),
        (503, "wait", Retryable),
    ],
)
def test_what_a_cluster_answers_to_a_submit_is_told_apart(code, text, kind):
    server = Server(lambda method, path, _: (code, text) if method == "POST" else (200, VERSION))
    backend = RayJobs(server.address)
    if kind is None:
        assert backend.start("j", job()) is True
        (_, _, body, _) = server.asked[-1]
        assert body["runtime_env"] == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}
        return
    with pytest.raises(kind) as refused:
        backend.start("j", job())
    assert type(refused.value) is kind
    assert "Traceback" not in str(refused.value)


DUPLICATE = """Traceback (most recent call last):
RuntimeError: Request failed with status code 400: Traceback (most recent call last):
ValueError: Job with submission_id j already exists. Please use a different submission_id.
.
"""
"""What Ray answers, with 500 where one would expect 409."""


def test_a_job_that_stands_there_is_not_an_error_and_a_cluster_without_agents_is_waited_for(monkeypatch):
    monkeypatch.setattr("cluster.ray_jobs.POLL_SECONDS", 0.01)
    answers = iter([(500, "No available agent to submit job, please try again later."), (500, DUPLICATE)])
    server = Server(lambda method, path, _: next(answers) if method == "POST" else (200, VERSION))
    assert RayJobs(server.address).start("j", job()) is False
    assert len(server.asked) > 3


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # of Ray's own client
def test_a_log_is_followed_through_a_proxy_without_web_sockets(monkeypatch, capsys):
    monkeypatch.setattr("cluster.ray_jobs.POLL_SECONDS", 0.01)
    said = iter(["one\n", "one\ntwo\n", "one\ntwo\n"])
    details = {"type": "SUBMISSION", "submission_id": "j", "entrypoint": "jepa", "status": "RUNNING"}
    states = iter(
        [details, (503, "away"), details, details | {"status": "FAILED", "driver_exit_code": 3, "message": "x\nit ended"}]
    )

    def answers(method, path, _):
        if path == "/api/version":
            return 200, VERSION
        if path.endswith("/tail"):
            return 404, "no web sockets here"
        if path.endswith("/logs"):
            return 200, {"logs": next(said, "one\ntwo\n")}
        found = next(states)
        return found if isinstance(found, tuple) else (200, found)

    assert RayJobs(Server(answers).address).follow("j") == State("failed", 3, "it ended")
    assert capsys.readouterr().out == "one\ntwo\n"


def test_the_address_that_is_given_is_the_one_that_is_asked(monkeypatch):
    other, given = Server(lambda *_: (200, VERSION)), Server(lambda *_: (200, VERSION))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other.address)  # Ray's client would prefer it
    RayJobs(given.address)
    assert (len(other.asked), bool(given.asked)) == (0, True)


def test_what_is_no_dashboard_is_told_from_one_that_is_silent(monkeypatch):
    for code, body in ((200, "<html>"), (200, {"status": "ok"}), (404, "not found")):
        with pytest.raises(UsageError):
            RayJobs(Server(lambda *_, code=code, body=body: (code, body)).address)
    monkeypatch.setattr("cluster.ray_jobs.ANSWER_SECONDS", 0.2)
    with pytest.raises(Retryable, match="it was silent"):
        RayJobs(Server(lambda *_: time.sleep(1) or (200, VERSION)).address)
    with pytest.raises(Retryable, match="no Ray dashboard answers"):
        RayJobs("http://127.0.0.1:1")


ENDED = "Job entrypoint command failed with exit code"
"""Ray's words, which KubeRay repeats."""


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, State("waiting")),
        ({"jobDeploymentStatus": "Suspended"}, State("waiting")),  # in Kueue's queue
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, State("running")),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, State("running")),
        ({"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"}, State("running")),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, State("succeeded")),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": f"{ENDED} 3"}, State("failed", 3, f"{ENDED} 3")),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, State("failed", None, "DeadlineExceeded")),
    ],
)  # fmt: skip
def test_the_state_of_a_rayjob(status, expected):
    assert kube._state({"status": status}) == expected


@pytest.fixture
def in_a_pod(tmp_path, monkeypatch):
    """A service account, and an API server that keeps what is created."""
    (tmp_path / "token").write_text("account-token\n")
    held: dict[str, dict] = {}

    def answers(method, path, body):
        parts = path.strip("/").split("/")
        name = parts[-1] if parts[-2] in ("rayjobs", "cronjobs") else ""
        if method == "POST":
            if body["metadata"]["name"] in held:
                return 409, {"message": "already exists", "reason": "AlreadyExists"}
            held[body["metadata"]["name"]] = {**body, "status": {}} | {"metadata": {**body["metadata"], "resourceVersion": "7"}}
            return 201, held[body["metadata"]["name"]]
        if not name:
            return 200, {"items": list(held.values())}
        if name not in held:
            return 404, {"message": f"rayjobs.ray.io {name!r} not found"}
        if method == "PUT":
            held[name] = body
        return 200, held.pop(name) if method == "DELETE" else held[name]

    server = Server(answers)
    monkeypatch.setattr(kube, "ACCOUNT", tmp_path)
    monkeypatch.setattr(kube, "API", server.address)
    monkeypatch.setattr(kube, "POLL_SECONDS", 0.01)
    return held, server


def kuberay(*words: str) -> SubmitConfig:
    given = ["target=kuberay", "pod.image=registry/jepa@sha256:0", "pod.namespace=team", *words, *INGEST]
    return presets.load(SubmitConfig, "submit", cli.overrides(cli.VERBS["submit"], given))


def test_a_rayjob_is_created_once_followed_and_told_by_its_exit_code(in_a_pod, reporter, capsys):
    from cluster import submit

    held, server = in_a_pod
    config = kuberay("window=2026-11-22", "wait=false")
    first, second = submit.run(config, reporter), submit.run(config, reporter)
    assert (first["new"], second["new"], list(held)) == (True, False, [first["job"]])
    assert first["job"].endswith("-2026-11-22")
    assert "2026-11-22" in held[first["job"]]["spec"]["entrypoint"]
    assert {(path, token) for _, path, _, token in server.asked} == {
        ("/apis/ray.io/v1/namespaces/team/rayjobs", "Bearer account-token")
    }
    message = "Job entrypoint command failed with exit code 4, last available logs"
    held[first["job"]]["status"] = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": message}
    assert kube.Kube("team").follow(first["job"]).exit_code == 4
    assert json.loads(capsys.readouterr().out)["status"] == "Failed FAILED"
    assert submit.run(config, reporter) == {"job": f"{first['job']}-try2", "new": True}
    with pytest.raises(InputRefused, match="jepa-none"):
        kube.Kube("team").state("jepa-none")


def test_a_schedule_is_created_and_replaced_and_its_pod_submits_the_window(in_a_pod, reporter):
    held, _ = in_a_pod
    words = ["apply", "every=day", "at=03:00", "pod.image=registry/jepa:1", "pod.namespace=team", "pod.decode_workers=4", *INGEST]
    config = presets.load(ScheduleConfig, "schedule", cli.overrides(cli.VERBS["schedule"], words))
    told = [schedule.run(config, reporter) for _ in range(2)]
    (document,) = held.values()
    assert told[0] == told[1]
    assert document["metadata"]["resourceVersion"] == "7"
    assert (document["kind"], document["spec"]["schedule"], document["spec"]["concurrencyPolicy"]) == (
        "CronJob",
        "0 3 * * *",
        "Forbid",
    )
    assert document["spec"]["startingDeadlineSeconds"] < 24 * 3600
    (container,) = document["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    verb, *rest = container["command"][1:]
    submitted = presets.load(SubmitConfig, verb, cli.overrides(cli.VERBS[verb], rest))
    assert (submitted.window, submitted.target, submitted.pod.decode_workers) == ("day@03:00", "kuberay", 4)
    assert submission.job_of(submitted).name == told[0]["next_job"]


KUBECTL = """#!/bin/sh
case "$*" in
  *"create --filename - --raw=/apis/ray.io/v1/namespaces/team/rayjobs") cat > "$0.made"; echo '{"kind": "RayJob"}' ;;
  *"get --raw=/apis/ray.io/v1/namespaces/team/rayjobs") echo '{"items": []}' ;;
  *"get --raw=/apis/ray.io/v1/namespaces/team/rayjobs/"*) echo 'Error from server (NotFound): no' >&2; exit 1 ;;
  *) echo 'Error from server (Forbidden): no' >&2; exit 1 ;;
esac
"""


def test_kubectl_does_the_same(tmp_path, reporter, monkeypatch):
    from cluster import submit

    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(kube, "ACCOUNT", tmp_path / "none")
    made = submit.run(kuberay("wait=false"), reporter)
    assert json.loads((tmp_path / "kubectl.made").read_text())["metadata"]["name"] == made["job"]
    with pytest.raises(InputRefused, match="NotFound"):
        kube.Kube("team").state("j")
    with pytest.raises(UsageError, match="Forbidden"):
        kube.Kube("team").stop("j")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="kubectl is not installed"):
        kube.Kube("team").states("")


def test_documents_are_rendered_without_a_cluster(tmp_path):
    out = tmp_path / "job.yaml"
    done = jepa("submit", "target=kuberay", "pod.image=i:1", f"out={out}", *INGEST)
    assert done.returncode == 0, done.stderr
    (document,) = yaml.safe_load_all(out.read_text())
    assert (document["kind"], document["metadata"]["name"]) == ("RayJob", job().name)
    shown = jepa("schedule", "render", "at=03:00", "pod.image=i:1", *INGEST)
    assert shown.returncode == 0, shown.stderr
    assert "kind: CronJob" in shown.stdout
