"""The table that `controlbooth evaluate` prints."""

from controlbooth.trainer.evaluation.figures import table


def figure(mean, chance=None, share=None):
    def spread(value):
        return dict(mean=value, low=value - 0.05, high=value + 0.05)

    told = spread(mean)
    told |= {} if chance is None else {"chance": spread(chance)}
    return told | ({} if share is None else {"share": spread(share)})


def evaluation(figures, samples=64):
    sampler = dict(scheduler="ddim", steps=20, guidance=2.0)
    speed = dict(ranks=1, seconds=1.0, drawn=0)
    return dict(figures=figures, samples=samples, step=50, sampler=sampler, sets={}, curve={}, speed=speed)


def test_chance_and_share_stand_beside_each_figure_and_those_of_the_trained_kind_come_first():
    ways = {
        "with control": dict(
            edge_f1=figure(0.8, 0.1, 0.78), depth_rmse=figure(0.1, 0.3, 0.69), says_count=figure(0.9)
        ),
        "real pictures": dict(
            edge_f1=figure(1.0, 0.1, 1.0), depth_rmse=figure(0.01, 0.3, 1.0), says_count=figure(1.0)
        ),
    }  # fmt: skip
    lines = table(evaluation(ways)).splitlines()
    assert all(len(line) <= 120 for line in lines)
    depth, edges, captions = (
        next(number for number, line in enumerate(lines) if line.startswith(name))
        for name in ("depth rmse (lower is better)", "edge f1", "prompt accuracy")
    )
    assert depth < edges < captions
    row = lines[edges + 1].split()
    assert row == "with control 0.800 (0.75-0.85) 0.100 (0.05-0.15) 78% (73% to 83%)".split()
    assert lines[edges].index("chance") + len("chance") == lines[edges + 1].index("(0.05-0.15)") + len("(0.05-0.15)")


def test_one_sample_is_said_to_have_no_chance():
    shown = table(evaluation({"with control": dict(edge_f1=figure(0.8))}, samples=1))
    assert "one held-out sample has no chance beside it: take more" in shown
    assert shown.splitlines()[-1].split() == "with control 0.800 (0.75-0.85) - -".split()


def test_a_figure_by_which_real_pictures_are_no_better_than_chance_is_said_to_tell_nothing():
    shown = table(evaluation({"with control": dict(edge_f1=figure(0.8, 0.8), mask_iou=figure(0.8, 0.1, 0.5))}))
    assert shown.count("tells nothing here: real pictures are not certainly better than chance") == 1
    assert shown.index("tells nothing") < shown.index("mask iou")
