"""Presets: one YAML file each, with its paper, expected numbers and command in its head. Data only, no code."""
