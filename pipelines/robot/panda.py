"""A simulated Franka Panda on a table: headless, primitives only, fast enough for two CPU cores.

The arm has the published Panda kinematics (joint origins and limits of the Franka documentation) drawn with
capsules and boxes, because software OpenGL is vertex-bound: a mesh robot renders five to ten times slower. The
state and action spaces are DROID's: pose of the tool centre point in the robot base frame, extrinsic xyz Euler
angles, gripper closedness.

The tool never touches the two objects inside ``WORKSPACE``, so an image goal made from a seed stays reachable for
the whole episode; inside ``CONTACT_WORKSPACE`` it pushes and grasps them. Shadow maps are off (they cost a factor of
two to three); a dark disc on the table below the tool stands in for its shadow, because one camera without it cannot
tell height from distance.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial.transform import Rotation

from pipelines.config import SimConfig
from pipelines.errors import UsageError
from pipelines.robot.scene import model_xml

if TYPE_CHECKING:
    import mujoco
    from numpy.typing import ArrayLike

WORKSPACE: tuple[np.ndarray, np.ndarray] = (np.array([0.35, -0.25, 0.10]), np.array([0.65, 0.25, 0.40]))
"""Lower and upper bounds of the commanded tool position, metres, base frame."""
CONTACT_WORKSPACE: tuple[np.ndarray, np.ndarray] = (np.array([0.32, -0.30, 0.022]), np.array([0.70, 0.30, 0.40]))
"""The same, low enough to touch what stands on the table."""
OBJECTS = ("cube", "cylinder")
CUBE_HALF_M = 0.025

NO_GL_MESSAGE = (
    "cannot render the simulated robot: no headless OpenGL library loads; install the Debian packages "
    "libegl1 libopengl0 libgl1-mesa-dri (egl) or libosmesa6 (osmesa), for example with `make system`"
)

# Tool pointing down, tilted by 0.15 rad: at exactly pi the roll angle would flip its sign with every tremor.
_TOOL_DOWN = Rotation.from_euler("xyz", [math.pi - 0.15, 0.0, 0.0])
_HOME_JOINTS = np.array([0.0, -math.pi / 5, 0.0, -4 * math.pi / 5, 0.0, 3 * math.pi / 5, math.pi / 4])
_MAX_FINGER_M = 0.04
_SUBSTEP_S = 0.004
_LEASH_M = 0.05
_LEASH_RAD = 0.3
_IK_DAMPING = 0.03
_IK_POSTURE_GAIN = 0.05
_IK_MAX_JOINT_STEP_RAD = 0.3


class PandaEnv:
    """One simulated arm. Physics needs no OpenGL; the GL context is made by the first ``render``.

    A GL context belongs to the process and thread that made it: give every Ray actor its own environment.
    """

    def __init__(self, config: SimConfig | None = None) -> None:
        """Build the model; call ``reset`` before anything else."""
        self.config = config = config or SimConfig()
        self._mj = _import_mujoco()
        self._model = self._mj.MjModel.from_xml_string(model_xml(config.image_size))
        self._substeps = max(1, round(1.0 / (config.control_hz * _SUBSTEP_S)))
        self._model.opt.timestep = 1.0 / (config.control_hz * self._substeps)
        self._data = self._mj.MjData(self._model)
        self._ik = self._mj.MjData(self._model)
        self._tool = self._model.site("tool").id
        self._shadow = self._model.geom("drop_shadow").id
        self._joints = np.array([self._model.joint(f"joint{i}").qposadr[0] for i in range(1, 8)])
        self._joint_dofs = np.array([self._model.joint(f"joint{i}").dofadr[0] for i in range(1, 8)])
        self._joint_range = np.stack([self._model.joint(f"joint{i}").range for i in range(1, 8)], axis=1)
        self._fingers = np.array([self._model.joint(f"finger_{side}").qposadr[0] for side in ("left", "right")])
        self._jacobian = np.zeros((6, self._model.nv))
        self._renderer: mujoco.Renderer | None = None
        self._target_xyz = np.zeros(3)
        self._target_rotation = _TOOL_DOWN
        self._target_gripper = 0.0
        self._command = _HOME_JOINTS.copy()
        self._workspace = WORKSPACE
        self.reset(0)

    def reset(
        self,
        seed: int,
        xyz: ArrayLike | None = None,
        *,
        gripper: float = 0.0,
        objects: Mapping[str, ArrayLike] | None = None,
        workspace: tuple[np.ndarray, np.ndarray] = WORKSPACE,
    ) -> None:
        """Place the objects from ``seed`` and the tool at ``xyz`` (metres), or at a seeded position; all at rest.

        The objects do not depend on ``xyz``. A position outside ``workspace``, which bounds the tool until the next reset, is
        clamped to it. ``objects`` puts all of them elsewhere: centres [3] in metres by name, edges along the axes.
        """
        position = np.random.default_rng([seed, 1]).uniform(*workspace) if xyz is None else np.asarray(xyz, np.float64)
        if position.shape != (3,) or not np.isfinite(position).all():
            raise UsageError(f"xyz must be three finite numbers in metres, got {xyz!r}")
        self._workspace = workspace
        self._mj.mj_resetData(self._model, self._data)
        if objects is None:
            self._place_objects(np.random.default_rng([seed, 0]))
        for name, centre in (objects or {}).items():
            self._place(name, [*np.asarray(centre, np.float64), 1.0, 0.0, 0.0, 0.0])
        self._target_xyz = np.clip(position, *workspace)
        self._target_rotation = _TOOL_DOWN
        self._target_gripper = float(np.clip(gripper, 0.0, 1.0))
        self._command = _HOME_JOINTS.copy()
        self._solve_ik(iterations=100)
        self._data.qpos[self._joints] = self._command
        self._data.qpos[self._fingers] = self._data.ctrl[7:] = _MAX_FINGER_M * (1.0 - self._target_gripper)
        self._data.ctrl[:7] = self._command
        self._mj.mj_step(self._model, self._data, nstep=25)
        self._refresh()

    def state(self) -> np.ndarray:
        """Measured state, float64 [7]: xyz metres, extrinsic xyz Euler rad, gripper closedness 0..1; base frame."""
        return _pose_vector(self._measured_xyz(), self._measured_rotation(), self._measured_gripper())

    def object_positions(self) -> dict[str, np.ndarray]:
        """Centre of each object, float64 [3] in metres; base frame."""
        return {name: self._data.body(name).xpos.copy() for name in OBJECTS}

    def target(self) -> np.ndarray:
        """Commanded state, float64 [7], in the units of ``state``; the servos follow it with a small lag."""
        return _pose_vector(self._target_xyz, self._target_rotation, self._target_gripper)

    def joint_state(self) -> np.ndarray:
        """Arm joints, float64 [3, 7]: positions (rad), velocities (rad/s), actuator torques (N m)."""
        torques = self._data.qfrc_actuator[self._joint_dofs]
        return np.stack([self._data.qpos[self._joints], self._data.qvel[self._joint_dofs], torques])

    def camera_extrinsics(self, camera: str) -> np.ndarray:
        """Camera pose in the base frame, float64 [6]: xyz metres, extrinsic xyz Euler rad.

        OpenCV camera axes as in DROID: x right, y down, z forward.
        """
        view = self._data.camera(camera)
        opencv_axes = view.xmat.reshape(3, 3) * np.array([1.0, -1.0, -1.0])
        return np.concatenate([view.xpos, Rotation.from_matrix(opencv_axes).as_euler("xyz")])

    def render(self, camera: str | None = None) -> np.ndarray:
        """The current image, uint8 [H, W, 3], a fresh array. Raises UsageError where no OpenGL library works."""
        if self._renderer is None:
            self._renderer = _make_renderer(self._mj, self._model, self.config.image_size)
            # Also runs at exit: OSMesa prints a traceback when its context outlives the interpreter's modules.
            self._free_renderer = weakref.finalize(self, self._renderer.close)
        # The disc lies under the tool; MuJoCo recomputes geom_xpos from the model at the next step anyway.
        self._data.geom_xpos[self._shadow, :2] = self._measured_xyz()[:2]
        self._renderer.update_scene(self._data, camera or self.config.camera)
        return self._renderer.render()

    def step(self, action: ArrayLike, ticks: int = 1) -> None:
        """Move by ``action`` [7], spread evenly over ``ticks`` control ticks.

        The action is delta xyz (metres), delta extrinsic xyz Euler (rad, left-multiplied in the base frame) and
        delta gripper closedness. It moves the commanded pose, not the lagging measured one; what a blocked arm
        could not follow is forgotten beyond 5 cm (0.3 rad). The commanded position stays inside the
        workspace of the last reset.
        """
        delta = np.asarray(action, np.float64)
        if delta.shape != (7,) or not np.isfinite(delta).all():
            raise UsageError(f"an action is seven finite numbers, got {action!r}")
        if ticks < 1:
            raise UsageError(f"ticks must be at least 1, got {ticks}")
        turn = Rotation.from_rotvec(Rotation.from_euler("xyz", delta[3:6]).as_rotvec() / ticks)
        for _ in range(ticks):
            self._shorten_leash()
            self._target_xyz = np.clip(self._target_xyz + delta[:3] / ticks, *self._workspace)
            self._target_rotation = turn * self._target_rotation
            self._target_gripper = float(np.clip(self._target_gripper + delta[6] / ticks, 0.0, 1.0))
            self._tick()

    def close(self) -> None:
        """Free the GL context; calling it twice is harmless."""
        if self._renderer is not None:
            self._free_renderer()
            self._renderer = None

    def snapshot(self) -> tuple[Any, ...]:
        """Everything ``restore`` needs to put this environment back exactly as it is now."""
        kind = self._mj.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(self._mj.mj_stateSize(self._model, kind))
        self._mj.mj_getState(self._model, self._data, physics, kind)
        told = (self._target_xyz, self._target_rotation, self._target_gripper, self._workspace)
        return physics, told, self._command.copy()

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Go back to a ``snapshot`` of this environment."""
        physics, told, command = snapshot
        self._target_xyz, self._target_rotation, self._target_gripper, self._workspace = told
        self._command = command.copy()
        self._mj.mj_setState(self._model, self._data, physics, self._mj.mjtState.mjSTATE_INTEGRATION)
        self._refresh()

    def _tick(self) -> None:
        """One control tick: inverse kinematics, then position servos following a ramp of joint targets."""
        before, before_fingers = self._command.copy(), float(self._data.ctrl[7])
        self._solve_ik(iterations=3)
        fingers = _MAX_FINGER_M * (1.0 - self._target_gripper)
        for substep in range(1, self._substeps + 1):
            part = substep / self._substeps
            self._data.ctrl[:7] = before + (self._command - before) * part
            self._data.ctrl[7:] = before_fingers + (fingers - before_fingers) * part
            self._mj.mj_step(self._model, self._data)
        self._refresh()

    def _solve_ik(self, iterations: int) -> None:
        """Move the commanded joints towards the target pose by damped least squares on the tool Jacobian."""
        for _ in range(iterations):
            self._ik.qpos[self._joints] = self._command
            self._mj.mj_kinematics(self._model, self._ik)
            self._mj.mj_comPos(self._model, self._ik)
            self._mj.mj_jacSite(self._model, self._ik, self._jacobian[:3], self._jacobian[3:], self._tool)
            jacobian = self._jacobian[:, self._joint_dofs]
            rotation = Rotation.from_matrix(self._ik.site_xmat[self._tool].reshape(3, 3))
            turn = (self._target_rotation * rotation.inv()).as_rotvec()
            error = np.concatenate([self._target_xyz - self._ik.site_xpos[self._tool], turn])
            posture = _IK_POSTURE_GAIN * (_HOME_JOINTS - self._command)
            # One solve gives both parts: J+ (e - J p) + p is the step with the posture pull kept in the null space.
            gram = jacobian @ jacobian.T + _IK_DAMPING**2 * np.eye(6)
            change = jacobian.T @ np.linalg.solve(gram, error - jacobian @ posture) + posture
            change = np.clip(change, -_IK_MAX_JOINT_STEP_RAD, _IK_MAX_JOINT_STEP_RAD)
            self._command = np.clip(self._command + change, *self._joint_range)

    def _shorten_leash(self) -> None:
        lag = self._target_xyz - self._measured_xyz()
        length = float(np.linalg.norm(lag))
        if length > _LEASH_M:
            self._target_xyz = self._measured_xyz() + lag * (_LEASH_M / length)
        measured = self._measured_rotation()
        turn = (self._target_rotation * measured.inv()).as_rotvec()
        angle = float(np.linalg.norm(turn))
        if angle > _LEASH_RAD:
            self._target_rotation = Rotation.from_rotvec(turn * (_LEASH_RAD / angle)) * measured

    def _place_objects(self, rng: np.random.Generator) -> None:
        lower, upper = np.array([0.35, -0.28]), np.array([0.68, 0.28])
        cube = rng.uniform(lower, upper)
        cylinder = rng.uniform(lower, upper)
        while np.linalg.norm(cylinder - cube) < 0.12:
            cylinder = rng.uniform(lower, upper)
        yaw = rng.uniform(0.0, math.pi / 2)
        cube_pose = [*cube, 0.025, math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]
        self._place("cube", cube_pose)
        self._place("cylinder", [*cylinder, 0.03, 1.0, 0.0, 0.0, 0.0])

    def _place(self, name: str, pose: list[float]) -> None:
        """Put an object at a pose [7]: xyz, quaternion w first."""
        address = int(self._model.jnt_qposadr[self._model.body(name).jntadr[0]])
        self._data.qpos[address : address + 7] = pose

    def _refresh(self) -> None:
        # mj_step leaves the poses of the start of its last substep; the state must be that of its end.
        self._mj.mj_kinematics(self._model, self._data)
        self._mj.mj_camlight(self._model, self._data)

    def _measured_xyz(self) -> np.ndarray:
        return self._data.site_xpos[self._tool].copy()

    def _measured_rotation(self) -> Rotation:
        return Rotation.from_matrix(self._data.site_xmat[self._tool].reshape(3, 3))

    def _measured_gripper(self) -> float:
        width = float(self._data.qpos[self._fingers].sum())
        return float(np.clip(1.0 - width / (2 * _MAX_FINGER_M), 0.0, 1.0))


def _pose_vector(xyz: np.ndarray, rotation: Rotation, gripper: float) -> np.ndarray:
    return np.concatenate([xyz, rotation.as_euler("xyz"), [gripper]])


def _import_mujoco() -> Any:
    """MuJoCo with a headless OpenGL backend chosen, which has to happen before its first import."""
    chosen = os.environ.get("MUJOCO_GL")
    # llvmpipe starts one thread per core; for small images the hand-over costs more than it brings.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if not chosen:
        os.environ["MUJOCO_GL"] = headless_gl() or "disable"
    try:
        import mujoco
    except Exception as error:  # a missing library surfaces as AttributeError or ctypes.ArgumentError in PyOpenGL
        raise UsageError(f"{NO_GL_MESSAGE} (MUJOCO_GL={chosen!r}: {error})") from error
    finally:
        if os.environ.get("MUJOCO_GL") == "disable" and not chosen:
            del os.environ["MUJOCO_GL"]
    return mujoco


def _make_renderer(mj: Any, model: mujoco.MjModel, image_size: int) -> mujoco.Renderer:
    if not hasattr(mj, "Renderer"):
        raise UsageError(NO_GL_MESSAGE)
    try:
        renderer = mj.Renderer(model, image_size, image_size)
    except Exception as error:  # PyOpenGL and MuJoCo raise many unrelated types here
        raise UsageError(f"{NO_GL_MESSAGE} ({error})") from error
    renderer.scene.flags[mj.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mj.mjtRndFlag.mjRND_REFLECTION] = False
    return renderer


def headless_gl() -> str | None:
    """The headless OpenGL backend that works here: ``egl``, ``osmesa``, or None."""
    # PyOpenGL's egl platform calls glGetError, so it needs a GL library besides libEGL, which does not depend on one.
    if _egl_works() and _loads("libOpenGL.so.0", "libGL.so.1"):
        return "egl"
    return "osmesa" if _loads("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so") else None


def _loads(*names: str) -> bool:
    """Whether one of these shared libraries can be loaded."""
    for name in names:
        with contextlib.suppress(OSError):
            return bool(ctypes.CDLL(name))
    return False


def _egl_works() -> bool:
    """Whether EGL initialises a device: libegl1 alone loads but finds none without the Mesa drivers."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    get_display = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not get_display:
        return False
    pointer, devices, count = ctypes.c_void_p, (ctypes.c_void_p * 8)(), ctypes.c_int(0)
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer, pointer)(query)
    if not query_devices(8, ctypes.byref(devices), ctypes.byref(count)):
        return False
    platform_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(get_display)
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    device_platform = 0x313F  # EGL_PLATFORM_DEVICE_EXT
    displays = (platform_display(device_platform, device, None) for device in devices[: count.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)
