"""Documents as `ctflow.bench.compare` makes them."""

from __future__ import annotations

GIB = 2**30


def result(seconds: float, overlap: float = 0.0, memory=(3 * GIB,)) -> dict:
    quickness = 1 / max(seconds, 1e-9)
    factors = {"factor_to_stock": 4.2 * quickness, "factor_to_stock_half": None, "factor_to_article": 5.0 * quickness}
    measured = {
        "reason": None,
        "memory_bytes": memory,
        "overlap": overlap,
        "windows": 144,
        "seconds": [seconds, seconds + 0.01],
    }
    dice = {"dice_to_stock": 0.9987, "dice_to_article": 0.9991, "dice_to_truth": 0.91}
    return {**measured, **factors, **dice, "median_s": seconds, "spread_s": 0.01}


def comparison_row(name: str, method: str, seconds: float | None, reason: str | None = None, memory=(3 * GIB,)) -> dict:
    status = "measured" if reason is None else "refused"
    entry = {"id": name, "text": f"text of {name}", "method": method, "reason": reason, "status": status}
    results = [result(seconds, 0.0, memory), result(2 * seconds, 0.25, memory)] if seconds is not None else None
    return entry if results is None else {**entry, "results": results}


def comparison_document(*rows: dict) -> dict:
    return {
        "date": "2026-11-21", "repeats": 3, "configurations": list(rows),
        "machine": {"gpus": ["NVIDIA H200"], "torch": "2.11", "processors": 16},
        "model": {"network": "SwinUNETR", "arguments": {"feature_size": 48}}, "case": {"shape": [300, 512, 512]},
    }  # fmt: skip


ROWS = (
    comparison_row("0a", "stock", 4.2),
    comparison_row("1", "article", 5.0),
    comparison_row("4", "article, one channel", None, "tensorrt: not installed [bold]"),
    comparison_row("eager-fp16", "ctflow", 1.25, memory=(GIB, 2 * GIB)),
)
