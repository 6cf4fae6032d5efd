"""The arithmetic of the costs, and the files that measured speeds are read from."""

import json
from pathlib import Path

import pytest

from recipes import cost


def test_hours_by_hand() -> None:
    measured = cost.Measured("arm_base", images_per_second=1000.0)
    assert measured.hours(300, gpus=1, efficiency=0.5) == pytest.approx(300 * 1_281_167 / 1000 / 3600)
    assert measured.hours(300, gpus=8, efficiency=0.5) == pytest.approx(300 * 1_281_167 / 4000 / 3600)
    on_two = cost.Measured("arm_base", images_per_second=1000.0, gpus=2)
    assert on_two.hours(1, gpus=2, efficiency=0.5, images=3600) == pytest.approx(1e-3)
    assert on_two.hours(1, gpus=4, efficiency=0.5, images=3600) == pytest.approx(1e-3)
    assert on_two.hours(1, gpus=1, efficiency=0.5, images=3600) == pytest.approx(4e-3)  # for fewer GPUs too


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_cost_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost.main(["--images-per-second", "1000", "--model", "arm_base", "--gpus", "8", "--efficiency", "0.9"])
    first, *_, paper = rows = cells(capsys.readouterr().out)
    assert [row[2] for row in rows] == ["300", "800", "1600", "300"]
    assert first[:5] == ["arm_base", "8", "300", "14.8", "119"]
    assert first[5] == "1,000 img/s measured on 1, 90% scaling efficiency assumed"
    assert paper == ["ARM-B", "8 A5000", "300", "34.0", "272", "*reported by the paper*"]

    speeds = [
        {"mode": "pretrain", "model": "arm_large", "img_per_s": 500.0},
        {"mode": "infer", "model": "x", "img_per_s": 1.0},
    ]
    (tmp_path / "speed.json").write_text(json.dumps(speeds))
    (tmp_path / "speed.csv").write_text("mode,model,img_per_s\npretrain,arm_large,500.0\ninfer,x,1\n")
    for name in ("speed.json", "speed.csv"):
        cost.main(["--throughput", str(tmp_path / name), "--gpus", "1", "--epochs", "800"])
        assert cells(capsys.readouterr().out)[0][:4] == ["arm_large", "1", "800", "569.4"]

    table = "mode,model,img_per_s,device\npretrain,a,1,GPU\npretrain,a,500,GPU\npretrain,a,3,CPU\n"
    (tmp_path / "speed.csv").write_text(table)
    cost.main(["--throughput", str(tmp_path / "speed.csv"), "--gpus", "1", "--epochs", "800"])
    newest = [row[5] for row in cells(capsys.readouterr().out)[:-1]]
    assert newest == ["500 img/s of the step alone measured on 1 GPU", "3 img/s of the step alone measured on 1 CPU"]

    same = {"recipe": "pretrain", "model": "arm_base", "device": "GPU", "processes": 2}
    table = [
        same | {"images": "decode=gpu", "images_per_second": 1.0},
        same | {"images": "fixed batch", "images_per_second": 9.0},
        same | {"images": "decode=gpu", "images_per_second": 800.0},
        same | {"images": "decode=cpu", "images_per_second": 400.0},
        same | {"images": "decode=cpu", "images_per_second": 7.0, "recipe": None},  # the loader alone
    ]
    (tmp_path / "real.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table))
    cost.main(["--real-images", str(tmp_path / "real.jsonl"), "--gpus", "2", "--epochs", "800"])
    real = [row[5] for row in cells(capsys.readouterr().out)[:-1]]
    assert real == [
        f"{n} img/s with real images (decode={p}pu) measured on 2 GPU" for n, p in ((800, "g"), (400, "c"))
    ]

    table = [
        same | {"images": "decode=gpu", "processes": n, "images_per_second": v} for n, v in ((1, 500.0), (4, 1800.0))
    ]
    (tmp_path / "real.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table))
    scaled = ["--real-images", str(tmp_path / "real.jsonl"), "--epochs", "1", "--images", "36000000", "--gpus"]
    cost.main([*scaled, "1", "4", "8"])
    of_one, of_four, of_eight = (row[3:] for row in cells(capsys.readouterr().out)[:-1])
    assert of_one == ["20.0", "20", "500 img/s with real images (decode=gpu) measured on 1 GPU"]
    assert of_four == ["5.6", "22", "1,800 img/s with real images (decode=gpu) measured on 4 GPU"]
    measured = f"{of_four[2]}, 90% scaling efficiency as measured from 1 to 4"
    assert of_eight == ["3.1", "25", measured]  # 3,240 img/s
    cost.main([*scaled, "8", "--efficiency", "0.5"])
    assert cells(capsys.readouterr().out)[0][5] == f"{of_four[2]}, 50% scaling efficiency assumed"

    (tmp_path / "config.yaml").write_text("model: arm_huge\n")
    speeds_then = [(1, 99.0), (1, 200.0), (2, 10.0), (2, 400.0), (2, 420.0), (2, 410.0)]  # it went on with two
    rows = [{"processes": number, "images_per_second": speed} for number, speed in speeds_then]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cost.main(["--run", str(tmp_path), "--gpus", "2", "--epochs", "1"])
    assert cells(capsys.readouterr().out)[0] == [
        "arm_huge",
        "2",
        "1",
        "0.9",
        "2",
        "410 img/s with real images measured on 2",
    ]
    cost.main(["--images-per-second", "410", "--measured-gpus", "2", "--gpus", "2", "--epochs", "1"])
    assert cells(capsys.readouterr().out)[0] == ["model", "2", "1", "0.9", "2", "410 img/s measured on 2"]


def test_bad_input_of_the_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "speed.json").write_text("[]")
    (tmp_path / "real.jsonl").write_text('{"recipe": null, "images": "decode=cpu"}\n')
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "images_per_second": 3}\n')
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_text('{"images_per_second": 3, "processes": 1}\n')
    (damaged / "config.yaml").write_text("model: [")
    of_others = {"finetune": "model: arm_base\npretrained: null", "segment": "head: fpn", "dvae": "model: dvae"}
    for recipe, config in of_others.items():
        (tmp_path / recipe).mkdir()
        (tmp_path / recipe / "config.yaml").write_text(config)
        (tmp_path / recipe / "metrics.jsonl").write_text('{"images_per_second": 3, "processes": 1}\n')
    (damaged / "speed.csv").write_text("mode,img_per_s\npretrain,3\n")
    for name, cells in (("fast", "a,fast"), ("empty", "a,")):
        (damaged / f"{name}.csv").write_text(f"mode,model,img_per_s\n\npretrain,b,3\npretrain,{cells}\n")
    (damaged / "long.csv").write_text(f"mode,model,img_per_s\npretrain,{'a' * 200_000},3\n")
    for name, speed in (("zero", 0), ("true", True), ("null", None), ("huge", 10**400)):
        (damaged / f"{name}.json").write_text(json.dumps([{"mode": "pretrain", "model": "a", "img_per_s": speed}]))
    (damaged / "bytes.jsonl").write_bytes(b"\xff\xfe")
    row = {"recipe": "pretrain", "images": "decode=cpu", "model": "arm_base", "device": "x", "processes": 1}
    for name, speed in (("text", "fast"), ("still", 0)):
        (damaged / f"{name}.jsonl").write_text(json.dumps({**row, "images_per_second": speed}))
    for gpus in (0, "8"):
        (damaged / f"on{gpus}.jsonl").write_text(json.dumps({**row, "images_per_second": 3, "processes": gpus}))
    of_argparse = 0
    for argv, message in (
        (["--run", str(damaged)], f"{damaged} is damaged, or no run and no file of"),
        *(
            (
                ["--throughput", str(damaged / file)],
                f"{damaged / file}, {place}: img_per_s is {came}; allowed: a number",
            )
            for file, place, came in (
                ("fast.csv", "line 4", "'fast'"),
                ("empty.csv", "line 4", "empty"),
                ("zero.json", "row 1", "0"),
                ("true.json", "row 1", "True"),
                ("null.json", "row 1", "empty"),
                ("huge.json", "row 1", str(10**400)),
            )
        ),
        (["--throughput", str(tmp_path / "gone.csv")], "No such file or directory"),
        (["--throughput", str(damaged / "long.csv")], "long.csv cannot be read as a table in UTF-8: by line 2, a"),
        (
            ["--throughput", str(damaged / "speed.csv")],
            f"{damaged / 'speed.csv'} is another table: it lacks the columns model; mend it",
        ),
        (["--run", str(tmp_path / "nowhere")], "allowed: the output_dir of recipes.pretrain, or --images-per"),
        *(
            (
                ["--run", str(tmp_path / recipe)],
                f"{tmp_path / recipe} is a run of recipes.{recipe}, whose speed is another; allowed: the output_dir "
                "of recipes.pretrain, or --images-per-second",
            )
            for recipe in of_others
        ),
        (["--run", str(tmp_path)], "holds no images_per_second with the number of processes"),
        (["--run", str(tmp_path), "--measured-gpus", "2"], "--measured-gpus go with --images-per-second"),
        (["--throughput", str(tmp_path / "speed.json"), "--model", "x"], "--model and --measured-gpus go with"),
        (["--throughput", str(tmp_path / "speed.json")], "no rows of pretraining; measure with --mode pretrain"),
        (["--real-images", str(tmp_path / "metrics.jsonl")], "is damaged, or no run and no file of"),
        (["--real-images", str(tmp_path / "real.jsonl")], "no rows of pretraining; measure with --step pretrain"),
        (["--real-images", str(damaged / "bytes.jsonl")], "bytes.jsonl is damaged, or no run and no file of"),
        (["--real-images", str(damaged / "text.jsonl")], "text.jsonl is damaged, or no run and no file of"),
        (["--real-images", str(damaged / "still.jsonl")], "arm_base was measured at 0 images per second; allowed"),
        (["--real-images", str(damaged / "on0.jsonl")], "arm_base was measured on 0 GPUs; allowed: a whole number"),
        (["--real-images", str(damaged / "on8.jsonl")], "arm_base was measured on '8' GPUs; allowed: a whole number"),
        (["--images-per-second", "3", "--efficiency", "nan"], "--efficiency is nan; allowed: a number above 0"),
        (["--images-per-second", "-3"], "must be above 0"),
        (["--images-per-second", "nan"], "model was measured at nan images per second; allowed: a number above 0"),
        (["--images-per-second", "3", "--gpus", "0"], "--gpus must be above 0"),
        ([], "is required"),
    ):
        with pytest.raises(SystemExit) as stop:
            cost.main(argv)
        said = capsys.readouterr().err
        assert message in said and stop.value.code == (2 if said.startswith("usage: ") else 1)
        of_argparse += said.startswith("usage: ")
    assert of_argparse == 6  # others are told of by the program itself
