"""jepa serve-planner: the planner behind a plain HTTP endpoint, one process and one world model.

POST /plan takes JSON: `observation` and `goal` (base64 of a PNG or JPEG file) or `goals` ([{"image", "steps"}]), `state` (7
numbers), `session` (a name). A session keeps its goals' tokens and the plan before; later requests may leave the goals out.
GET /health tells the state of things. Searches run one after the other: they share a device.
"""

import base64
import binascii
import contextlib
import hashlib
import hmac
import io
import json
import math
import os
import signal
import threading
import time
from collections import OrderedDict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np

from pipelines import storage
from pipelines.errors import InputRefused, UsageError
from pipelines.progress import Reporter
from pipelines.serve_config import TOKEN_VARIABLE, ServePlannerConfig

LOCAL = ("127.0.0.1", "::1", "localhost")
FORMATS = ("PNG", "JPEG")
KEPT_LATENCIES = 10_000
READ_TIMEOUT_S = 30.0
"""For a client that stops in the middle of a request."""
MAX_GOALS = 32


class Refused(Exception):
    """A request that cannot be answered: HTTP status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Session(NamedTuple):
    """Goals of one client, by their digest, and the pursuit of them (jepa_core.planner.Pursuit)."""

    digest: str
    pursuit: Any
    sizes: list[tuple[int, int]]


class Planner:
    """World model, sessions and latencies; `answer` may be called from many threads."""

    def __init__(self, config: ServePlannerConfig, world: Any) -> None:
        """world: see post_train.WorldModel; it moves to an accelerator where there is one."""
        import torch

        self.config, self.world = config, world
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        world.encoder.to(self.device)
        world.predictor.to(self.device)
        self.predict = world.for_planning()
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.seconds: deque[float] = deque(maxlen=KEPT_LATENCIES)
        self.lock = threading.Lock()

    def answer(self, request: Any) -> dict[str, Any]:
        """The reply to the JSON of POST /plan. Raises Refused."""
        import torch

        began = time.perf_counter()
        if not isinstance(request, dict):
            raise Refused(400, "the body must be a JSON object")
        name = request.get("session", "")
        if not isinstance(name, str) or len(name) > 200:
            raise Refused(400, "session must be a name of at most 200 characters")
        state = _state(request.get("state"))
        observation = self._image(request.get("observation"), "observation")
        goals = self._goals(request)
        with self.lock, torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            session = self._session(name, goals)
            others = sorted({size for size in session.sizes if size != _size(observation)})
            if others and self.config.other_size == "refuse":
                raise Refused(422, f"goal images of {_sizes(others)}, but the observation has {_sizes([_size(observation)])}: "
                              "send images of one size, or start the server with other_size=resize")  # fmt: skip
            index = session.pursuit.goal_index
            found = session.pursuit.act(self._tokens(observation), torch.tensor(state, device=self.device))
            if not all(math.isfinite(number) for number in found.actions.flatten().tolist()):
                raise Refused(422, "the search ended with numbers that are not finite: check state and images")
            seconds = time.perf_counter() - began
            self.seconds.append(seconds)
        crop = self.world.crop_size
        return {
            "action": found.actions[0].tolist(), "actions": found.actions.tolist(), "energies": found.energies,
            "iterations": found.iterations, "evaluations": found.evaluations, "session": name, "goal": index,
            "latency_s": round(seconds, 4), "search_s": round(found.seconds, 4),
            "images": f"cut to their centre as in training and scaled to {crop}x{crop}"
            + (f"; goals of {_sizes(others)}, observation of {_sizes([_size(observation)])}" if others else ""),
        }  # fmt: skip

    def percentiles(self) -> dict[str, float]:
        """Latencies of the last answers, in seconds, from the whole request to its action."""
        if not self.seconds:
            return {}
        values = np.percentile(tuple(self.seconds), (50, 95, 99))
        return {f"p{q}_s": round(float(value), 4) for q, value in zip((50, 95, 99), values, strict=True)}

    def _goals(self, request: dict[str, Any]) -> list[tuple[np.ndarray, int]]:
        """Pictures and their numbers of steps; empty where the request leaves them to the session."""
        if "goal" in request and "goals" in request:
            raise Refused(400, "give goal or goals, not both")
        if "goal" in request:
            return [(self._image(request["goal"], "goal"), 1)]
        goals = request.get("goals", [])
        if not isinstance(goals, list) or len(goals) > MAX_GOALS or not all(isinstance(goal, dict) for goal in goals):
            raise Refused(400, f'goals must be a list of at most {MAX_GOALS} objects, {{"image": BASE64, "steps": NUMBER}}')
        found = []
        for number, goal in enumerate(goals):
            steps = goal.get("steps")
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
                raise Refused(400, f"goals[{number}].steps must be a whole number of at least 1")
            found.append((self._image(goal.get("image"), f"goals[{number}].image"), steps))
        return found

    def _session(self, name: str, goals: list[tuple[np.ndarray, int]]) -> Session:
        """The session of that name, new where the goals are."""
        import torch

        from jepa_core.planner import Pursuit

        session = self.sessions.get(name)
        if goals:
            told = hashlib.sha256()
            for image, steps in goals:
                told.update(repr((image.shape, steps)).encode() + image.tobytes())
            if session is None or session.digest != told.hexdigest():
                tokens = torch.stack([self._tokens(image) for image, _ in goals])
                rng = torch.Generator(self.device).manual_seed(self.config.seed)
                pursuit = Pursuit(self.predict, tokens, [steps for _, steps in goals], self.config.planner, rng)
                session = Session(told.hexdigest(), pursuit, [_size(image) for image, _ in goals])
        if session is None:
            raise Refused(409, f"session {name!r} has no goal here (any more): send goal or goals with the request")
        self.sessions[name] = session
        self.sessions.move_to_end(name)
        while len(self.sessions) > self.config.max_sessions:
            self.sessions.popitem(last=False)
        return session

    def _image(self, text: Any, what: str) -> np.ndarray:
        """RGB [H, W, 3] of a base64 file."""
        from PIL import Image, UnidentifiedImageError

        if not isinstance(text, str):
            raise Refused(400, f"{what} is missing: give the base64 text of a PNG or JPEG file")
        try:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=FORMATS) as image:
                if image.width * image.height > self.config.max_pixels:
                    raise Refused(
                        413, f"{what} has {image.width}x{image.height} pixels, over max_pixels={self.config.max_pixels}"
                    )
                if min(image.size) < 16:
                    raise Refused(422, f"{what} has {image.width}x{image.height} pixels: too small to show anything")
                return np.asarray(image.convert("RGB"))
        except (binascii.Error, UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
            raise Refused(422, f"{what} is not the base64 text of a PNG or JPEG file ({error})") from error

    def _tokens(self, image: np.ndarray) -> Any:
        """Tokens [P, D] of a picture, brought to the encoder's size as training frames were."""
        import torch

        from jepa_core.sampling import centre_crop
        from pipelines.post_train_data import REFERENCE_RATIO
        from pipelines.video import frame_patches, scale_image

        world = self.world
        box = centre_crop(*_size(image), *([REFERENCE_RATIO] if world.crop == "reference" else []))
        patches = frame_patches(scale_image(image, box, world.crop_size)[None], world.encoder.config.patch_size)
        return world.encode(torch.from_numpy(patches)[None].to(self.device))[0, 0]


def _state(given: Any) -> list[float]:
    numbers = isinstance(given, list) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in given)
    if not numbers or len(given) != 7 or not all(abs(n) < 1e3 for n in given):
        raise Refused(400, "state must be 7 finite numbers: x y z in metres, Euler angles in radians, gripper closedness")
    return [float(number) for number in given]


def _size(image: np.ndarray) -> tuple[int, int]:
    return image.shape[1], image.shape[0]


def _sizes(sizes: list[tuple[int, int]]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes) + " pixels"


class Handler(BaseHTTPRequestHandler):
    """POST /plan and GET /health; everything else is refused with a sentence."""

    planner: Planner
    token: str
    timeout = READ_TIMEOUT_S

    def do_GET(self) -> None:
        """Tell that the server lives, its sessions and latencies."""
        self._reply(self._health)

    def do_POST(self) -> None:
        """Plan one action."""
        self._reply(self._plan)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: a robot sends several a second."""

    def _health(self) -> dict[str, Any]:
        if self.path != "/health":
            raise Refused(404, "GET /health or POST /plan")
        planner = self.planner
        return {"sessions": len(planner.sessions), "answers": len(planner.seconds), **planner.percentiles()}

    def _plan(self) -> dict[str, Any]:
        if self.path != "/plan":
            raise Refused(404, "GET /health or POST /plan")
        length, limit = self.headers.get("Content-Length", ""), int(self.planner.config.max_body_mb * 2**20)
        if not length.isdecimal():
            raise Refused(411, "the request needs a Content-Length")
        if int(length) > limit:
            raise Refused(413, f"the body has {length} bytes, over max_body_mb={self.planner.config.max_body_mb:g}")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON ({error})") from error
        return self.planner.answer(request)

    def _reply(self, answer: Any) -> None:
        status = 200
        try:
            if self.token and not hmac.compare_digest(
                self.headers.get("Authorization", "").encode(), f"Bearer {self.token}".encode()
            ):
                raise Refused(401, f"the request needs Authorization: Bearer TOKEN, the server's {TOKEN_VARIABLE}")
            body = answer()
        except Refused as refused:
            status, body = refused.status, {"error": str(refused)}
            self.close_connection = True  # what is left of the body is not read
        except TimeoutError:
            status, body = 408, {"error": f"the body did not arrive within {READ_TIMEOUT_S:g} seconds"}
        except Exception as error:  # noqa: BLE001 - one request's mistake must not end the server
            status, body = 500, {"error": f"{type(error).__name__}: {error}"}
        data = json.dumps(body).encode()
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client has left
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


def make_server(config: ServePlannerConfig, world: Any, token: str = "") -> ThreadingHTTPServer:
    """A server that listens, and serves after serve_forever(). Raises UsageError for an address it cannot have."""
    if config.host not in LOCAL and not token:
        raise UsageError(f"host={config.host} can be reached from other machines: set {TOKEN_VARIABLE} in the environment")
    handler = type("PlannerHandler", (Handler,), {"planner": Planner(config, world), "token": token})
    try:
        return ThreadingHTTPServer((config.host, config.port), handler)
    except OSError as error:
        raise UsageError(f"host={config.host} port={config.port}: {error.strerror}, choose another or port=0") from error


def run(config: ServePlannerConfig, reporter: Reporter) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM. Returns how many answers were given and their latencies."""
    from pipelines.post_train import load_world_model

    model = storage.normalize(config.model)
    world = load_world_model(model)
    if world.camera_frame or world.predictor.config.use_extrinsics:
        raise InputRefused(f"{model} knows actions by the camera's pose, which requests do not tell: post-train without it")
    server = make_server(config, world, os.environ.get(TOKEN_VARIABLE, ""))
    host, port = server.server_address[:2]
    print(json.dumps({"event": "serving", "url": f"http://{host}:{port}/plan", "model": model}), flush=True)

    def stop(*_: Any) -> None:
        threading.Thread(target=server.shutdown).start()  # shutdown waits for the loop that this handler interrupts

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)
    try:
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()
    planner = server.RequestHandlerClass.planner
    return {"model": model, "answers": len(planner.seconds), **planner.percentiles()}
