import struct
from pathlib import Path

from alignment_pipeline.plots import bar_panels, bars, below_a_curve, curves, distributions, histogram


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_plots_are_png_files_of_one_size_and_the_same_bytes_for_the_same_data(tmp_path: Path) -> None:
    for name in ("first", "second"):
        histogram(tmp_path / name / "h.png", {"prompt": [1.0, 2.0, 2.0], "completion": [5.0]}, "Lengths", "tokens")
        curves(
            tmp_path / name / "c.png", {"ppo": ([0, 1, 2], [0.1, 0.2, 0.3]), "dpo": ([0], [1.0])}, "KL", "step", "nats"
        )
        bars(tmp_path / name / "b.png", {"base": (0.1, 0.02), "sft": (0.7, 0.03)}, "Score", "gold rule")
    for plot in ("h.png", "c.png", "b.png"):
        first = (tmp_path / "first" / plot).read_bytes()
        assert size_of(first) == (660, 385)
        assert first == (tmp_path / "second" / plot).read_bytes()
        assert b"Software" not in first


def test_a_plot_of_nothing_is_an_empty_plot(tmp_path: Path) -> None:
    histogram(tmp_path / "h.png", {"prompt": []}, "Lengths", "tokens")
    curves(tmp_path / "c.png", {}, "Loss", "step", "loss")
    assert size_of((tmp_path / "h.png").read_bytes()) == size_of((tmp_path / "c.png").read_bytes())


def test_distributions_are_wide_and_the_plane_below_a_curve_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    for name in ("first", "second"):
        distributions(
            tmp_path / name / "d.png", ["aa", "ab", "ba"], {"reference": [0.5, 0.3, 0.2], "optimum": [0.2, 0.3, 0.5]},
            {"ppo": [0.2, 0.3, 0.5], "dpo": [0.25, 0.3, 0.45]}, "Policies", "response", "probability",
        )  # fmt: skip
        below_a_curve(
            tmp_path / name / "c.png", ("bound", [(0.0, 0.0), (1.0, 1.0), (2.0, 1.5)]),
            {"ppo": [(0.0, 0.0), (1.0, 0.8)]}, {"optimum": [(1.0, 1.0)], "dpo": [(0.9, 0.8)]}, "Plane", "KL", "reward",
        )  # fmt: skip
    for plot, size in (("d.png", (1210, 440)), ("c.png", (660, 385))):
        first = (tmp_path / "first" / plot).read_bytes()
        assert size_of(first) == size
        assert first == (tmp_path / "second" / plot).read_bytes()


def test_panels_of_bars_grow_with_their_rows_and_are_the_same_each_time(tmp_path: Path) -> None:
    panels = {"BLEU": [(1.0, 0.0), (2.0, 0.0)], "score": [(0.1, 0.02), (0.2, 0.02)]}
    for name in ("first", "second"):
        bar_panels(tmp_path / f"{name}.png", ["greedy", "beams 5"], panels, "Decoding")
    first = (tmp_path / "first.png").read_bytes()
    assert first == (tmp_path / "second.png").read_bytes()
    longer = {name: [*values, *values] for name, values in panels.items()}
    bar_panels(tmp_path / "longer.png", ["a", "b", "c", "d"], longer, "Decoding")
    (width, height), (same, higher) = size_of(first), size_of((tmp_path / "longer.png").read_bytes())
    assert width == same and height < higher
