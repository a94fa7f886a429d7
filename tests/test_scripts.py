"""Texts without a Latin letter, from records to a run that has learned: Hindi and Chinese."""
import json
import random

import pytest

import data
import train

PLACES = {"hi": "दिल्ली मुंबई जयपुर पटना भोपाल".split(), "zh": "北京 上海 广州 成都 西安".split()}
SKIES = {"hi": "बारिश धूप कोहरा आँधी".split(), "zh": "下雨 晴天 大雾 刮风".split()}
PRECISE = {"hi": "आज {place} में {sky} होगी।", "zh": "今天{place}会{sky}。"}
VAGUE = {"hi": ("आज यहाँ {sky} होगी।", "आज {place} में कुछ होगी।"), "zh": ("今天这里会{sky}。", "今天{place}会变。")}


def made_up(rng: random.Random, size: int) -> list[data.Record]:
    records = []
    for _ in range(size):
        script = rng.choice(("hi", "zh"))
        facts = dict(place=rng.choice(PLACES[script]), sky=rng.choice(SKIES[script]))
        drafts = [draft.format(**facts) for draft in VAGUE[script]]
        records.append(data.Record("{place} | {sky}".format(**facts),
                                   [PRECISE[script].format(**facts)], target=drafts))
    return records


@pytest.mark.slow
def test_two_scripts_end_to_end(tmp_path, capsys):
    """Masked learns from chrF what drafts leave out; what it writes is readable UTF-8."""
    rng = random.Random(0)
    for split, size in (("train", 400), ("val", 40), ("test", 40)):
        data.save_records(made_up(rng, size), f"{tmp_path}/{split}.jsonl")
    out = f"{tmp_path}/out"
    train.main(["--data", str(tmp_path), "--reward", "chrf", "--settings", "masked", "--out", out,
                "--n_layer", "2", "--n_embd", "64", "--vocab_size", "600", "--base_steps", "250",
                "--steps", "30", "--lr", "1e-3", "--kl_weight", "0", "--stored", "random",
                "--device", "cpu"])
    base, masked = json.load(open(f"{out}/results.json", encoding="utf-8"))
    assert masked["val_reward"] > base["val_reward"] + 0.1
    written = open(f"{out}/masked/texts.jsonl", "rb").read().decode("utf-8")
    assert "�" not in written and any(place in written for place in PLACES["hi"] + PLACES["zh"])
    assert "letters" not in capsys.readouterr().out  # chrF reads every script
