"""Neuronpedia's JSON: a batch of features in the layout that SAEDashboard writes and Neuronpedia imports.

A batch is {"model_id", "layer", "sae_set", "features": [...]}; the fields of a feature and of its activations have the
names and the units of that layout. What it has and a dashboard does not (correlated neurons, alignment with neurons)
stays empty.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from saelab.base.files import whole_file
from saelab.dashboards.writing.tables import Data

_NO_BIN = -1.0  # bounds of examples that belong to no interval


def write(data: Data, path: Path, model_id: str | None = None, sae_set: str | None = None) -> Path:
    """Write the pages of the first SAE as one batch; returns `path`."""
    sae = data.manifest["saes"][0]
    layer = re.search(r"blocks\.(\d+)\.", sae["site"])
    batch = {
        "model_id": model_id or data.manifest["model"]["name"],
        "layer": int(layer[1]) if layer else 0,
        "sae_set": sae_set or sae["site"],
        "features": [
            _feature(data, columns, edges, i)
            for columns, edges in data.pages(sae)
            for i in range(len(columns["latent"]))
        ],
    }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(batch, ensure_ascii=True, allow_nan=False), encoding="ascii")
    return path


def _feature(data: Data, columns: dict[str, Any], edges: np.ndarray, i: int) -> dict[str, Any]:
    def row(name: str) -> np.ndarray:
        width = len(columns[name]) // len(columns["latent"])
        return columns[name][i * width : (i + 1) * width]

    corpus = data.manifest["corpus"]
    stop = int(columns["hist_bins"][: i + 1].sum(dtype=np.int64))
    heights = columns["hist"][stop - int(columns["hist_bins"][i]) : stop]
    centres = 2.0 ** ((int(columns["hist_first"][i]) + np.arange(len(heights)) + 0.5) / 4)
    together = row("coact") != 0xFFFFFFFF
    both = row("coact_both")[together].astype(float)
    union = int(columns["contexts"][i]) + row("coact_contexts")[together] - both
    feature: dict[str, Any] = {
        "feature_index": int(columns["latent"][i]),
        "neuron_alignment_indices": [], "neuron_alignment_values": [], "neuron_alignment_l1": [],
        "correlated_neurons_indices": [], "correlated_neurons_l1": [], "correlated_neurons_pearson": [],
        "correlated_features_indices": row("coact")[together].tolist(), "correlated_features_l1": [],
        "correlated_features_pearson": (both / np.maximum(union, 1)).tolist(),
        "neg_str": [], "neg_values": [], "pos_str": [], "pos_values": [],
        "frac_nonzero": float(columns["count"][i] / max(corpus["counted"], 1)),
        "freq_hist_data_bar_values": centres.tolist(), "freq_hist_data_bar_heights": heights.tolist(),
        "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [],
        "n_prompts_total": corpus["contexts"], "n_tokens_in_prompt": corpus["context_length"], "dataset": corpus["name"],
        "decoder_weights_dist": row("heads").astype(float).tolist() if "heads" in columns else [],
    }  # fmt: skip
    if "top" in columns:
        low, high = float(columns["logit_lo"][i]), float(columns["logit_hi"][i])
        feature |= {
            "pos_str": data.words(row("top")), "pos_values": row("top_value").astype(float).tolist(),
            "neg_str": data.words(row("bottom")), "neg_values": row("bottom_value").astype(float).tolist(),
            "logits_hist_data_bar_heights": row("logit_hist").tolist(),
            "logits_hist_data_bar_values": np.linspace(low, high, 2 * len(row("logit_hist")) + 1)[1::2].tolist(),
        }  # fmt: skip
    feature["activations"] = [_activation(data, columns, i, w) for w in range(int(edges[i]), int(edges[i + 1]))]
    return feature


def _activation(data: Data, columns: dict[str, Any], i: int, w: int) -> dict[str, Any]:
    start = int(columns["length"][:w].sum(dtype=np.int64))
    offset, n = int(columns["offset"][w]), int(columns["length"][w])
    values = columns["acts"][start : start + n] * (float(columns["scale"][i]) / 255)
    group = data.manifest["groups"][int(columns["group"][w])]
    interval = group["kind"] == "interval"
    highest = float(np.nan_to_num(columns["max"][i]))
    return {
        "bin_min": group["lo"] * highest if interval else _NO_BIN,
        "bin_max": group["hi"] * highest if interval else _NO_BIN,
        "bin_contains": group["hi"] - group["lo"] if group["kind"] == "quantile" else _NO_BIN,
        "tokens": data.words(columns["pool"][offset : offset + n]),
        "values": values.tolist(),
    }
