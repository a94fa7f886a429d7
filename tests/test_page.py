"""The page: its JavaScript, run by node, against PyTorch, sorl.py and data/rewards.py."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import train
import torch

import data
from conftest import sorl, uniform
from data.rewards import rouge
from lab import page
from lab.task import load_policy
from model import log_probs

ODD = ["</script><script>bad()</script><!--", "$& $1 $` \\u003c \\", "\"one\" 'two' {{DATA}} &lt;",
       "日本語 ελληνικά हिन्दी", "line\u2028end\x85 x", "😀 naïve ﬁ İ K", "a_b__c 1.5", "the the"]
RECORDS = [data.Record(f"rain {i} {ODD[i % 8]}", [f"{i}, it rains $&", "</script>"], static=[
    f"rain {i % 7} and some wind from the sea", f"wind {i % 9}"]) for i in range(60)]
VAL = RECORDS[24:48]
DOM = """  // the least of a browser that the page asks for
class Node {
  children = []; value = ""; textContent = ""; clientWidth = 600;
  append(...more) { this.children.push(...more); } replaceChildren(...all) { this.children = all; }
  setAttribute(name, value) { this[name] = value; }
}
const nodes = Object.fromEntries(given.map(id => [id, new Node()])), document = {
  getElementById: id => nodes[id], createElementNS: () => new Node(), activeElement: {} };
const read = node => node.children ? node.textContent + node.children.map(read).join("") : node;
nodes.data.textContent = json, nodes.record.value = 0;
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):  # the folder of a finished comparison
    folder = tmp_path_factory.mktemp("page")
    for split, part in zip(data.SPLITS, (RECORDS[:24], VAL, RECORDS[48:])):
        data.save_records(part, f"{folder}/{split}.jsonl")
    train.main(["--settings", "online", "masked", "--data", str(folder), "--out", f"{folder}/out",
                *"--n_layer 2 --n_embd 32 --init_std .15 --vocab_size 400 --K 4 --base_steps 30 "
                 "--steps 3 --batch_size 4 --kl_weight 0 --device cpu".split()])
    return f"{folder}/out"


def scripts(text: str) -> list[str]:
    """Data, method and view of a page: what a browser takes for its script elements."""
    return re.findall(r"<script[^>]*>(.*?)</script", text, re.S)


def node(out: str, code: str, given):
    """`answer` after the page's method and this code, with the page's data in `json` and `live`."""
    shutil.which("node") or pytest.skip("there is no node here to run the page's JavaScript")
    json_text, method, view = scripts(page.make_page(out, ["online", "masked"]))
    head = ("const [json, given] = JSON.parse(require('fs').readFileSync(0)); let answer;\n"
            "{ const { live } = JSON.parse(json);")
    program = f"{method}{head}{code.replace('VIEW', view)}}} console.log(JSON.stringify(answer))"
    return json.loads(subprocess.run(["node", "-e", program], input=json.dumps([json_text, given]),
                                     stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout)


def test_every_tab_shows_what_is_in_the_data(out):
    """None of it breaks the page, or makes it load anything."""
    page.main([out])
    text = Path(out, "page.html").read_text("utf-8")
    (content, method, view), ids = scripts(text), re.findall(r'<\w+ [^>]*?id="(\S+?)"', text)
    content = json.loads(content)
    assert content["records"] == [[r.source, r.references, r.static] for r in VAL[:20]]
    assert re.findall(r"(?:src|href)=\S+", text) == ['href="data:,">'] and len(text) < 8e6
    assert set(re.findall(r"\w+://[\w./]+", method + view)) == {"http://www.w3.org/"}
    shown = node(out, DOM + """{VIEW
        answer = Object.keys(TABS).map(tab => choose({ tab, K: 3 }, true)
          ?? ["cost", "samples", "texts"].map(id => read(nodes[id])));}""", ids)
    fps = {tab: int(cost.split()[0]) for tab, (cost, *_) in zip(page.TABS, shown)}
    assert fps | {"offline": 2, "masked": 1, "static": 1} == fps and fps["online"] > 3
    assert all(text in shown[0][1] for text in VAL[0].static)  # offline ranks the stored texts
    assert all(of["texts"][-1][0] in shown[0][2] for of in content["courses"].values())


def test_logits(out):
    """Of ten sources and static texts: PyTorch's, and nearly those of rounded weights."""
    policy = load_policy(f"{out}/masked/best.pt", "cpu")
    tok, logits = policy.tok, lambda ids: policy.model(torch.tensor([ids]))[0].detach()
    rows = [[*tok.encode(r.source), tok.sep, *tok.encode(r.static[0])] for r in VAL[:10]]
    mine, share = node(out, """const gpt = new GPT(live, live.weights.masked);
        answer = [given.flatMap(ids => ids.map((_, t) => [...gpt.logits(ids.slice(0, t + 1))])),
                  drawPair(gpt, given[0], false).disagree];""", rows)
    mine, true = torch.tensor(mine), torch.cat([logits(row) for row in rows])
    assert (mine - true).abs().max() < 2e-2 and len(mine) > 100
    assert (mine.argmax(-1) == true.argmax(-1)).float().mean() >= 0.99
    policy.model.half().float()  # the weights of the page
    assert (mine - torch.cat([logits(row) for row in rows])).abs().max() < 2e-4
    first, blind, *after = (log_probs(logits([*rows[0], *more])[-1], end=False).exp()
                            for more in ([], [tok.mask], *([v] for v in range(tok.pad))))
    pairs = first[:tok.pad, None] * blind  # drawn in one pass: (V,V), of the first and the second
    assert abs(share - pairs[torch.stack(after) < blind / 10].sum()) < 0.02


def test_tokens_and_rouge(out):
    tok = load_policy(f"{out}/base/best.pt", "cpu").tok
    texts = ["", *ODD, *(r.static[0][i:].replace(" ", "", i % 5) for i, r in enumerate(VAL))]
    ids = [tok.encode(text) for text in texts]
    broken = [[*row[1:], tok.eos, *row] for row in ids]
    pairs = [(text, [other, ODD[6]]) for text in texts for other in texts]
    encoded, decoded, scores = node(out, """const tok = new Tokenizer(live);
        answer = [given[0].map(text => tok.encode(text)), given[1].map(ids => tok.decode(ids)),
                  given[2].map(([text, references]) => rouge(text, references))];""",
                                    [texts, broken, pairs])
    assert encoded == ids and decoded == [tok.decode(row) for row in broken]
    assert abs(rouge(*zip(*pairs)) - scores).max() < 1e-6


@pytest.mark.parametrize("tab", page.TABS[1:])
def test_update_given_the_same_uniforms(out, tab):
    """Masks, samples and FPs are those of sorl.py; the push is the gradient of its loss."""
    policy, r, K, T = load_policy(f"{out}/base/best.pt", "cpu"), VAL[0], 6, 24
    how = json.loads(scripts(page.make_page(out, []))[0])["tabs"][tab]
    how |= {"static": {"adv_scale": "none"}, "full": {"baseline": "loo"}}.get(tab, {})
    batch = data.make_batch([r], [r.static[0]], [r.static[:1]], policy.tok, T)
    lengths, length, p_m = batch.static_len[0], int(batch.static_len), how["p_m"]
    static = torch.cat([batch.static[0], torch.full((1, T - length), policy.tok.pad)], 1)
    coins, u, R = uniform(1, T, seed=3), uniform(1, K, T, seed=4), uniform(1, K, seed=5)
    mask = sorl.sample_tail(coins[:, 0], lengths, T, p_m) if tab == "tail" else sorl.sample_mask(
        coins, lengths + T * (how["observation"] == "full"), p_m)
    given = policy.model.half().float(), batch.src, batch.pad  # the weights of the page
    fed, decoded = sorl.feed(*given, static, mask, u, how["observation"])
    logits = sorl.target_logits(*given, fed).detach().requires_grad_()
    rollout = sorl.act(logits, static, mask, u, decoded)
    sorl.policy_loss(rollout, sorl.advantage(R, how["baseline"], how["adv_scale"])).backward()
    tensors = {"source": batch.src, "text": static, "R": R, "mask": coins, "tokens": u}
    found = node(out, """const { how, length, text, source, R, mask } = given;
        const gpt = new GPT(live, live.weights.base), run = sample(gpt, source, text, how, given);
        const A = advantage(R, how), { fed, acted } = run.samples[0];
        const masks = [0, .5, 1].map(p => sampleMask(mask, length, p));
        const tails = mask.map(u => sampleTail(u, length, 24, .6));
        answer = { ...run, masks, tails, pushes: acted.map((_, t) => {
          const { all, of } = collect(run.samples, A, t, 0), full = how.observation === "full";
          const p = softmax(gpt.logits([...source, ...fed.slice(0, t)]), full);
          return Array.from(p, (pi, v) => of(v).A - pi * all.A);
        }) };""", {"how": how, "length": length, **{k: x[0].tolist() for k, x in tensors.items()}})
    assert found["mask"] == mask[0].tolist() and found["fp"] == int(rollout.fp)
    assert found["masks"] == [sorl.sample_mask(coins, lengths, p)[0].tolist() for p in (0, .5, 1)]
    assert found["tails"] == sorl.sample_tail(coins[0], lengths, T, .6).tolist()
    assert [of["tokens"] for of in found["samples"]] == rollout.tokens[0].tolist()
    for t in rollout.acted[0, 0].nonzero()[:, 0]:
        push = K * logits.grad[(fed[:, :t] == fed[0, :t]).all(1), t].sum(0)  # of this state
        assert (torch.tensor(found["pushes"][t]) + push).abs().max() < 1e-4


def test_without_models(out, monkeypatch):  # another script, or too large: a sentence says why
    monkeypatch.setattr(page, "SIZE", 50_000)  # a page that is full carries the base alone
    assert [*json.loads(scripts(page.make_page(out, []))[0])["live"]["weights"]] == ["base"]
    for name, value, why in (("blind_to", lambda *_: "odd", "odd"), ("LARGEST", 10, "at most")):
        monkeypatch.setattr(page, name, value)
        content = json.loads(scripts(page.make_page(out, []))[0])
        assert not content["live"] and why in content["why_not"] and content["courses"]
    pytest.raises(data.InputError, page.make_page, f"{out}/base", [])  # one run's folder
