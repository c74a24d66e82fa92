"""The planning server through a real HTTP client, on a tiny random world model."""

import base64
import io
import json
import socket
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_core.action_predictor import ActionPredictor
from jepa_core.config import ActionPredictorConfig, EncoderConfig
from jepa_core.encoder import VisionTransformer
from jepa_core.planner_config import PlannerConfig
from pipelines import presets, serve_planner
from pipelines.errors import UsageError
from pipelines.post_train import WorldModel
from pipelines.progress import Reporter
from pipelines.serve_config import TOKEN_VARIABLE, ServePlannerConfig

STATE = [0.4, 0.0, 0.3, 3.1, 0.0, 0.0, 0.0]
PLANNER = PlannerConfig(samples=8, iterations=2, elites=2)


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    encoder = VisionTransformer(EncoderConfig(24, 1, 2)).eval().requires_grad_(False)
    predictor = ActionPredictor(ActionPredictorConfig(24, 1, 2, action_scale=10.0), 24).eval().requires_grad_(False)
    return WorldModel(encoder, predictor, 32, 4.0)


@pytest.fixture
def serving(world):
    """Starts a server with given options and token; gives its address."""
    servers = []

    def start(token="", **options):
        server = serve_planner.make_server(ServePlannerConfig("none", port=0, planner=PLANNER, **options), world, token)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def picture(seed, width=48, height=32, kind="PNG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def post(address, body, token=None, path="/plan"):
    """(status, reply)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def asked(**changes):
    return {"observation": picture(1), "goal": picture(2), "state": STATE} | changes


def test_an_action_comes_back_and_a_session_keeps_goal_and_warm_start(serving):
    address = serving()
    status, first = post(address, asked(session="arm"))
    assert status == 200
    assert len(first["action"]) == 7
    assert all(abs(n) <= 0.075 for n in first["action"][:3])
    assert first["evaluations"] == 16
    assert first["latency_s"] >= first["search_s"] > 0
    status, second = post(address, {"observation": picture(1), "state": STATE, "session": "arm"})
    assert status == 200
    assert second["action"] != first["action"], "the search went on from the plan before"
    assert post(address, asked(session="other"))[1]["action"] == first["action"], "another session starts as this one did"
    with urllib.request.urlopen(address + "/health", timeout=600) as reply:
        health = json.load(reply)
    assert (health["sessions"], health["answers"]) == (2, 3)
    assert 0 < health["p50_s"] <= health["p95_s"] <= health["p99_s"]


def test_goals_take_turns(serving):
    address = serving()
    goals = [{"image": picture(2), "steps": 2}, {"image": picture(3, kind="JPEG"), "steps": 1}]
    body = {"observation": picture(1), "state": STATE, "session": "s", "goals": goals}
    assert [post(address, body)[1]["goal"] for _ in range(4)] == [0, 0, 1, 1]


def test_a_session_that_was_silent_for_longest_is_forgotten(serving):
    address = serving(max_sessions=1)
    post(address, asked(session="one"))
    post(address, asked(session="two"))
    status, reply = post(address, {"observation": picture(1), "state": STATE, "session": "one"})
    assert status == 409
    assert "send goal" in reply["error"]


def test_a_goal_image_of_another_size_is_resized_or_refused_and_said(serving):
    other = asked(goal=picture(2, 64, 64))
    status, reply = post(serving(), other)
    assert status == 200
    assert "scaled to 32x32; goals of 64x64 pixels, observation of 48x32 pixels" in reply["images"]
    status, reply = post(serving(other_size="refuse"), other)
    assert status == 422
    assert "64x64 pixels, but the observation has 48x32" in reply["error"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"\x80\x04}", 400, "not JSON"),
        ([1], 400, "JSON object"),
        (asked(state=[0.0] * 6), 400, "7 finite numbers"),
        (asked(state=[float("nan")] * 7), 400, "7 finite numbers"),
        (asked(goal="x"), 422, "goal is not the base64"),
        (asked(observation=base64.b64encode(b"GIF89a").decode()), 422, "observation is not"),
        (asked(goal=picture(2, 4000, 13)), 413, "over max_pixels=50000"),
        (asked(goal=picture(2, 8, 8)), 422, "too small"),
        (asked(goals=[]), 400, "not both"),
        ({"observation": picture(1), "state": STATE, "goals": [{"image": picture(2), "steps": 0}]}, 400, r"goals[0].steps"),
        ({"observation": picture(1), "state": STATE}, 409, "has no goal"),
        (b"x" * 300_000, 413, "over max_body_mb=0.25"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else None,
)
def test_what_cannot_be_answered_is_refused_by_name(serving, body, status, words):
    code, reply = post(serving(max_body_mb=0.25, max_pixels=50_000), body)
    assert (code, words in reply["error"]) == (status, True), reply


def test_a_token_is_asked_for_and_other_paths_are_not_served(serving):
    address = serving(token="sesame")
    assert post(address, asked())[0] == 401
    assert post(address, asked(), token="wrong")[0] == 401
    assert post(address, asked(), token="sesame")[0] == 200
    assert post(address, asked(), token="sesame", path="/other")[0] == 404


def test_a_request_without_length_is_refused(serving):
    host, port = serving().removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=600) as client:
        client.sendall(b"POST /plan HTTP/1.0\r\n\r\n")
        assert b" 411 " in client.makefile("rb").readline()


def test_addresses_it_should_not_or_cannot_have(world):
    with pytest.raises(UsageError, match=TOKEN_VARIABLE):
        serve_planner.make_server(ServePlannerConfig("none", host="0.0.0.0", port=0), world)
    taken = serve_planner.make_server(ServePlannerConfig("none", port=0), world)
    with pytest.raises(UsageError, match="choose another"):
        serve_planner.make_server(ServePlannerConfig("none", port=taken.server_address[1]), world)
    taken.server_close()
    with pytest.raises(UsageError, match=r"planner.samples=1"):
        presets.load(ServePlannerConfig, "serve-planner", ["model=a", "planner.samples=1"])


def test_the_verb_serves_until_it_is_told_to_stop_and_reports_latencies(world, monkeypatch, capsys):
    import os
    import signal

    from pipelines import post_train

    monkeypatch.setattr(post_train, "load_world_model", lambda run: world)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    replies = []

    def client():
        url = None
        while url is None:
            out = capsys.readouterr().out
            url = json.loads(out.splitlines()[0])["url"] if out else None
        replies.append(post(url.removesuffix("/plan"), asked()))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        result = serve_planner.run(ServePlannerConfig("/model", port=0, planner=PLANNER), Reporter())
    finally:
        thread.join()
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert replies[0][0] == 200
    assert result["answers"] == 1
    assert 0 < result["p50_s"] == result["p99_s"]
