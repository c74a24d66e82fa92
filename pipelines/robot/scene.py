"""The simulated scene as MJCF: a Franka Panda made of capsules and boxes, a table, two objects, three cameras.

Joint origins, joint limits and torque limits are the published ones (Franka Control Interface documentation); masses
are rough, and gravity is compensated as the real controller does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

CAMERAS: tuple[str, ...] = ("left", "right", "wrist")

_MJCF = """
<mujoco model="panda_table">
  <compiler angle="radian" autolimits="true"/>
  <option integrator="implicitfast" cone="elliptic" impratio="5"/>
  <visual>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
    <map znear="0.02" zfar="8"/>
    <global offwidth="{size}" offheight="{size}"/>
    <quality shadowsize="0" offsamples="{samples}" numslices="14" numstacks="8" numquads="1"/>
  </visual>
  <statistic center="0.5 0 0.2" extent="1"/>
  <default>
    <joint damping="1" armature="0.1"/>
    <geom type="capsule" contype="0" conaffinity="0" rgba="0.93 0.93 0.95 1"/>
    <default class="joint_cover"><geom rgba="0.35 0.38 0.42 1"/></default>
    <default class="solid"><geom contype="1" conaffinity="1" condim="3" friction="1 0.01 0.001"/></default>
    <default class="finger">
      <joint type="slide" axis="0 1 0" range="0 0.04" damping="5" armature="0.05"/>
      <geom type="box" size="0.011 0.009 0.0265" pos="0 0.009 0.0285" mass="0.03" rgba="0.10 0.70 0.25 1"/>
    </default>
    <position kv="60"/>
  </default>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0.55 0.62 0.70" rgb2="0.30 0.33 0.38"
             width="16" height="96"/>
    <texture name="checker" type="2d" builtin="checker" rgb1="0.78 0.74 0.66" rgb2="0.60 0.56 0.49"
             width="64" height="64"/>
    <material name="table" texture="checker" texrepeat="6 9" specular="0" shininess="0"/>
  </asset>
  <worldbody>
    <light directional="true" castshadow="false" pos="0.5 0.5 2" dir="-0.2 -0.4 -1" diffuse="0.55 0.55 0.55"
           specular="0.1 0.1 0.1"/>
    <camera name="left" pos="{left_pos}" xyaxes="{left_axes}" fovy="40"/>
    <camera name="right" pos="{right_pos}" xyaxes="{right_axes}" fovy="40"/>
    <geom name="table" class="solid" type="box" size="0.6 0.9 0.02" pos="0.4 0 -0.02" material="table" rgba="1 1 1 1"/>
    <geom name="drop_shadow" type="cylinder" size="0.04 0.0005" pos="0.5 0 0.001" rgba="0.05 0.05 0.08 0.65"/>
    <body name="cube" pos="0.5 0.2 0.025">
      <freejoint/>
      <geom class="solid" type="box" size="0.025 0.025 0.025" mass="0.1" rgba="0.85 0.10 0.10 1"/>
    </body>
    <body name="cylinder" pos="0.5 -0.2 0.03">
      <freejoint/>
      <geom class="solid" type="cylinder" size="0.025 0.03" mass="0.1" rgba="0.10 0.25 0.85 1"/>
    </body>
    <body name="link0" gravcomp="1">
      <geom class="joint_cover" fromto="-0.08 0 0.05 0 0 0.05" size="0.07"/>
      <body name="link1" pos="0 0 0.333" gravcomp="1">
        <joint name="joint1" axis="0 0 1" range="-2.8973 2.8973"/>
        <geom fromto="0 0 -0.24 0 0 -0.05" size="0.062" mass="3"/>
        <body name="link2" quat="0.70710678 -0.70710678 0 0" gravcomp="1">
          <joint name="joint2" axis="0 0 1" range="-1.7628 1.7628"/>
          <geom class="joint_cover" fromto="0 0 -0.06 0 0 0.06" size="0.062" mass="1"/>
          <geom fromto="0 -0.06 0 0 -0.20 0" size="0.056" mass="2"/>
          <body name="link3" pos="0 -0.316 0" quat="0.70710678 0.70710678 0 0" gravcomp="1">
            <joint name="joint3" axis="0 0 1" range="-2.8973 2.8973"/>
            <geom fromto="0 0 -0.10 0.07 0 0" size="0.052" mass="2.5"/>
            <body name="link4" pos="0.0825 0 0" quat="0.70710678 0.70710678 0 0" gravcomp="1">
              <joint name="joint4" axis="0 0 1" range="-3.0718 -0.0698"/>
              <geom class="joint_cover" fromto="0 0 -0.055 0 0 0.055" size="0.056" mass="1"/>
              <geom fromto="0 0 0 -0.0825 0.14 0" size="0.050" mass="1.5"/>
              <body name="link5" pos="-0.0825 0.384 0" quat="0.70710678 -0.70710678 0 0" gravcomp="1">
                <joint name="joint5" axis="0 0 1" range="-2.8973 2.8973"/>
                <geom fromto="0 0 -0.24 0 0.02 -0.05" size="0.047" mass="2.5"/>
                <body name="link6" quat="0.70710678 0.70710678 0 0" gravcomp="1">
                  <joint name="joint6" axis="0 0 1" range="-0.0175 3.7525"/>
                  <geom class="joint_cover" fromto="0 0 -0.05 0 0 0.05" size="0.050" mass="0.8"/>
                  <geom fromto="0 0 0 0.088 0 0" size="0.045" mass="0.7"/>
                  <body name="link7" pos="0.088 0 0" quat="0.70710678 0.70710678 0 0" gravcomp="1">
                    <joint name="joint7" axis="0 0 1" range="-2.8973 2.8973"/>
                    <geom class="joint_cover" fromto="0 0 0 0 0 0.075" size="0.042" mass="0.7"/>
                    <body name="hand" pos="0 0 0.107" quat="0.92387953 0 0 -0.38268343" gravcomp="1">
                      <camera name="wrist" pos="0.09 0 0.0" xyaxes="0 1 0 0.94 0 0.34" fovy="75"/>
                      <geom class="solid" type="box" size="0.026 0.10 0.033" pos="0 0 0.033" mass="0.6"
                            rgba="0.98 0.55 0.05 1"/>
                      <site name="tool" pos="0 0 0.1034" rgba="0 0 0 0"/>
                      <body name="finger_left" pos="0 0 0.0584" gravcomp="1">
                        <joint name="finger_left" class="finger"/>
                        <geom class="finger" contype="1" conaffinity="1"/>
                      </body>
                      <body name="finger_right" pos="0 0 0.0584" quat="0 0 0 1" gravcomp="1">
                        <joint name="finger_right" class="finger"/>
                        <geom class="finger" contype="1" conaffinity="1"/>
                      </body>
                    </body>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <contact><exclude body1="finger_left" body2="finger_right"/></contact>
  <actuator>
    <position joint="joint1" kp="2500" kv="120" forcerange="-87 87"/>
    <position joint="joint2" kp="2500" kv="120" forcerange="-87 87"/>
    <position joint="joint3" kp="2500" kv="120" forcerange="-87 87"/>
    <position joint="joint4" kp="2500" kv="120" forcerange="-87 87"/>
    <position joint="joint5" kp="1200" kv="50" forcerange="-12 12"/>
    <position joint="joint6" kp="1200" kv="50" forcerange="-12 12"/>
    <position joint="joint7" kp="1200" kv="50" forcerange="-12 12"/>
    <position joint="finger_left" kp="400" kv="20" forcerange="-20 20"/>
    <position joint="finger_right" kp="400" kv="20" forcerange="-20 20"/>
  </actuator>
</mujoco>
"""


def model_xml(image_size: int) -> str:
    """The MJCF document of the arm, the table, the objects and the cameras, for square frames of ``image_size``."""
    views = {"left": np.array([1.22, 0.80, 0.85]), "right": np.array([1.22, -0.80, 0.85])}
    fields: dict[str, Any] = {"size": image_size, "samples": 4}
    for name, position in views.items():
        forward = np.array([0.45, 0.02 if name == "left" else -0.02, 0.22]) - position
        right = np.cross(forward, [0.0, 0.0, 1.0])
        axes = np.concatenate([right, np.cross(right, forward)])
        fields[f"{name}_pos"] = " ".join(f"{value:.6f}" for value in position)
        fields[f"{name}_axes"] = " ".join(f"{value:.6f}" for value in axes)
    return _MJCF.format(**fields)
