"""jepa_core against `transformers`, an implementation of somebody else's, with the same random weights, in float32.

Weights go through jepa_core.weights, so the maps of `jepa convert` are tested with them.
"""

import pytest
import torch
from torch import nn

from jepa_core import weights
from jepa_core.attentive import AttentiveClassifier
from jepa_core.config import EncoderConfig, PredictorConfig, ProbeConfig
from jepa_core.encoder import VisionTransformer
from jepa_core.positions import Grid
from jepa_core.predictor import MaskedPredictor

transformers = pytest.importorskip("transformers")
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model  # noqa: E402
