"""Sparse autoencoders: planted directions are found, files are SAELens's, a splice changes what it says and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from families import tiny
from features_helpers import spoken, words
from torch import Tensor

from vesalius.errors import ModelError, PartError, RunError, VesaliusError
from vesalius.features.dictionaries import (
    SAE,
    SAERecipe,
    changing,
    gather,
    meanings,
    parse_place,
    prompt_rows,
    quality,
    spliced,
    train_sae,
)
from vesalius.features.dictionaries.meaning import logit_effects
from vesalius.features.dictionaries.places import hook_name, place_name, read
from vesalius.features.dictionaries.quality import explained, recovered
from vesalius.features.dictionaries.training import fit, folded
from vesalius.model import Model, Site
from vesalius.runs import Run

D, TRUE = 24, 40


def planted_vectors(n: int = 6000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors that are sums of few of 40 directions in 24 dimensions, off centre; and the directions."""
    drawn = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=drawn), dim=-1)
    on = (torch.rand(n, TRUE, generator=drawn) < 0.05).float() * (0.5 + torch.rand(n, TRUE, generator=drawn))
    return 7 * on @ directions + 3, directions


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_planted_directions_are_found(architecture: str, tmp_path: Path) -> None:
    x, directions = planted_vectors()
    recipe = SAERecipe(architecture=architecture, k=3, l1=3.0, passes=25, batch=512, lr=4e-3)  # type: ignore[arg-type]
    with Run.start({"command": "x"}, tmp_path) as run:
        sae = fit(run, x, Site("resid_post", 1), recipe, 56, "x")
    cosines = (sae.W_dec @ directions.T).amax(0)
    chance = torch.nn.functional.normalize(torch.randn(56, D, generator=torch.Generator().manual_seed(9)), dim=-1)
    assert (cosines > 0.9).float().mean() >= 0.9 > 0.2 > ((chance @ directions.T).amax(0) > 0.9).float().mean()
    numbers, density, _ = explained(sae, planted_vectors(2000, seed=0)[0])
    assert numbers["explained"] > (0.8 if architecture == "topk" else 0.6) and numbers["l0"] < 8
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(56), atol=1e-5)
    assert density.shape == (56,) and numbers["dead"] == (density == 0).mean()


def test_dead_features_start_anew_towards_what_is_missed(tmp_path: Path) -> None:
    from vesalius.features.dictionaries.training import Trained

    x, _ = planted_vectors(500)
    module = Trained(x, SAERecipe(k=3), 12, 10)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module.decode(module.encode(x)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        module.b_enc[4] = -1e6
    module.fires.fill_(5.0)[4] = 0
    before = module.W_dec.detach().clone()
    assert module.resample(optimizer, 10) == 1
    changed = (module.W_dec != before).any(-1)
    assert changed.tolist() == [i == 4 for i in range(12)]
    missed = x - module.decode(module.encode(x)).detach()
    assert torch.cosine_similarity(module.W_dec[4], missed, dim=-1).max() > 0.9
    assert (optimizer.state[module.W_dec]["exp_avg"][4] == 0).all() and module.fires.sum() == 0


def test_the_scale_of_training_is_folded_into_the_weights() -> None:
    from vesalius.features.dictionaries.training import Trained

    x, _ = planted_vectors(200)
    recipe = SAERecipe(architecture="standard")
    module = Trained(x * 0.31, recipe, 16, 0)
    with torch.no_grad():
        module.b_enc.add_(0.4)
        module.W_dec.mul_(3)  # a length that training has not set to 1 yet
    sae = folded(module, 0.31, Site("resid_post", 0), recipe)
    assert torch.allclose(sae.encode(x) * 0.31, module.encode(x * 0.31), atol=1e-4)
    assert torch.allclose(sae(x) * 0.31, module.decode(module.encode(x * 0.31)), atol=1e-4)


# -- files


def weights(architecture: str, d: int = 32, f: int = 50) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(3)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn)

    made = {"W_enc": some(d, f) * 0.3, "W_dec": some(f, d), "b_dec": some(d), "b_enc": some(f) * 0.1}
    if architecture == "jumprelu":
        made["threshold"] = some(f).abs()
    if architecture == "gated":
        made |= {"b_gate": some(f) * 0.1, "r_mag": some(f) * 0.1, "b_mag": some(f) * 0.1}
    return made


def reference(architecture: str, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Features, written from the papers one vector and feature at a time."""
    out = torch.zeros(len(x), w["W_enc"].shape[1])
    for i, v in enumerate(x):
        centred = v - w["b_dec"]
        for j in range(out.shape[1]):
            p = float(centred @ w["W_enc"][:, j])
            if architecture == "gated":
                size = p * float(w["r_mag"][j].exp()) + float(w["b_mag"][j])
                out[i, j] = max(size, 0.0) if p + float(w["b_gate"][j]) > 0 else 0.0
                continue
            p += float(w["b_enc"][j])
            if architecture == "jumprelu":
                out[i, j] = p if p > float(w["threshold"][j]) else 0.0
            else:
                out[i, j] = max(p, 0.0)
        if architecture == "topk":
            keep = out[i].argsort(descending=True)[:5]
            out[i] = torch.zeros_like(out[i]).index_copy(0, keep, out[i][keep])
    return out


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_every_architecture_is_its_formula_and_comes_back_from_its_file(architecture: str, tmp_path: Path) -> None:
    w, x = weights(architecture), torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    sae = SAE(architecture, w, Site("mlp_out", 2), k=5, metadata={"model_name": "some"})  # type: ignore[arg-type]
    wanted = reference(architecture, w, x)
    assert torch.allclose(sae.encode(x), wanted, atol=1e-4)
    assert torch.allclose(sae(x), wanted @ w["W_dec"] + w["b_dec"], atol=1e-4)
    sae.save(tmp_path)
    back = SAE.load(tmp_path)
    assert torch.equal(back(x), sae(x)) and back.site == sae.site and back.metadata["model_name"] == "some"


def test_the_file_is_what_saelens_reads(tmp_path: Path) -> None:
    """Fields and tensor names of SAELens 6 (read there and back with version 6.54; it refuses to be a dependency)."""
    from safetensors import safe_open

    made = SAE("topk", weights("topk"), Site("z", 4), k=5)
    made.belongs(tiny("gpt2"))
    made.save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    needed = {"d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"}
    assert needed | {"reshape_activations", "architecture", "k", "metadata"} <= set(config)
    assert config["architecture"] == "topk" and config["reshape_activations"] == "hook_z" and config["k"] == 5
    assert config["metadata"]["sae_lens_version"].startswith("6.")  # else it is read as a file of an older version
    assert config["metadata"]["hook_name"] == "blocks.4.attn.hook_z"
    with safe_open(tmp_path / "sae_weights.safetensors", "pt") as file:
        assert set(file.keys()) == {"W_enc", "b_enc", "W_dec", "b_dec"}
        assert file.get_tensor("W_enc").shape == (32, 50)


def test_files_of_older_versions_and_other_programs_are_read_or_refused(tmp_path: Path) -> None:
    made = SAE("standard", weights("standard"), Site("resid_pre", 1))
    made.save(tmp_path)
    old = {"d_in": 32, "d_sae": 50, "hook_name": "blocks.1.hook_resid_pre", "model_name": "gpt2-small"}
    old |= {"activation_fn": "topk", "activation_fn_kwargs": {"k": 7}, "architecture": "standard"}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    again = SAE.load(tmp_path)
    assert (again.architecture, again.k, place_name(again.site)) == ("topk", 7, "L1.resid_pre")
    unsure = again.check(tiny("gpt2"))
    assert "no fingerprint" in unsure[0] and "gpt2-small" in unsure[0]
    for change, why in (
        ({"architecture": "transcoder", "activation_fn": None}, "architecture 'transcoder'"),
        ({"normalize_activations": "layer_norm"}, "normalises activations by 'layer_norm'"),
        ({"hook_name": "blocks.1.hook_nonsense"}, "no site here"),
        ({"hook_name": ""}, "does not say which site"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps(old | change))
        with pytest.raises(RunError, match=why):
            SAE.load(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(RunError, match="no SAE in .*no cfg.json"):
        SAE.load(tmp_path)


def test_an_sae_of_another_model_or_width_is_refused(tmp_path: Path) -> None:
    model, other = tiny("llama"), tiny("llama", seed=1)
    sae = SAE("standard", weights("standard"), Site("resid_post", 1))
    sae.belongs(model)
    sae.save(tmp_path)
    assert SAE.load(tmp_path, model).check(model) == []
    with pytest.raises(VesaliusError, match=f"{model.fingerprint}.*{other.fingerprint}.*--force"):
        SAE.load(tmp_path, other)
    assert "another model" in SAE.load(tmp_path, other, force=True).check(other, force=True)[0]
    narrow = SAE("standard", weights("standard", d=20), Site("resid_post", 1))
    with pytest.raises(VesaliusError, match="width 20, and L1.resid_post of llama has 32"):
        narrow.check(model, force=True)
    with pytest.raises(VesaliusError, match="width 20, not 32"):
        narrow.encode(torch.zeros(1, 32))


# -- in the forward pass


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("llama", "L1.resid_post"),
        ("gpt2", "L1.MLP"),
        ("gemma2", "L0.attn"),
        ("llama", "L2.z"),
        ("gpt-neox", "L1.neurons"),
    ],
)
def test_what_is_read_is_what_transformers_has_and_the_error_term_changes_nothing(family: str, place: str) -> None:
    model = spoken(family)
    site = parse_place(place)
    rows = prompt_rows(model, [words(3, 4, 5, 6, 7), words(9, 10)])
    x = gather(model, site, rows)
    whole = model.run(rows.ids[0][None], capture=[site])[site].flatten(2)[0, 1:]
    assert torch.allclose(x.x[: len(whole)], whole, atol=1e-5) and len(x.x) == rows.n_tokens
    sae = SAE("topk", weights("topk", d=x.x.shape[1]), site, k=5, metadata={"vesalius_skip": 1})
    ids = rows.ids[0][None]
    plain = model.logits(ids)
    with spliced(model, sae):
        assert torch.equal(model.hf(ids).logits, plain)
    with spliced(model, sae, error=False):
        without = model.hf(ids).logits
    taken = model.run(
        ids, taps={site: [lambda a: torch.cat([a[:, :1], sae(a.flatten(2)[:, 1:]).view_as(a[:, 1:])], 1)]}
    )
    assert torch.allclose(without, taken.logits, atol=1e-4) and not torch.allclose(without, plain, atol=1e-2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_changing_a_feature_adds_its_direction() -> None:
    model, site = spoken("llama"), Site("resid_post", 1)
    sae = SAE("standard", weights("standard"), site, metadata={"vesalius_skip": 1})
    ids = prompt_rows(model, [words(3, 4, 5, 6)]).ids[0][None]
    before = sae.encode(read(model, site, ids))[0, 1:, 7]
    for op, value, moved in (("add", 2.0, 2.0), ("set", 1.5, None), ("scale", 0.0, None)):
        by = torch.full_like(before, moved) if moved else (value if op == "set" else 0.0) - before
        wanted = model.run(ids, capture=[site])[site].clone()
        wanted[0, 1:] += by[:, None] * sae.W_dec[7]
        with spliced(model, sae, changing(sae, {7: value}, op)):  # type: ignore[arg-type]
            seen: list[Tensor] = []
            handle = model.anatomy.block(1).module.register_forward_hook(
                lambda _, __, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            model.hf(ids)
            handle.remove()
        assert torch.allclose(seen[0], wanted, atol=1e-4), op
    with pytest.raises(VesaliusError, match="no feature 50; it has 0 to 49"):
        changing(sae, {50: 1.0})


def test_generation_is_changed_at_every_new_token_with_and_without_a_cache() -> None:
    model = spoken("llama")
    sae = SAE("standard", weights("standard"), Site("resid_post", 1), metadata={"vesalius_skip": 1})
    ids = prompt_rows(model, [words(3, 4, 5, 6)]).ids[0][None]
    texts = []
    for cache in (True, False):
        with spliced(model, sae, changing(sae, {7: 6.0})):
            made = model.hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                use_cache=cache,
                pad_token_id=0,
            )
        texts.append(made[0].tolist())
    assert texts[0] == texts[1]


def test_quality_is_what_its_definitions_say() -> None:
    model, site = spoken("llama"), Site("resid_post", 1)
    rows = prompt_rows(model, [words(*range(i, i + 9)) for i in range(3, 40, 6)])
    x = gather(model, site, rows).x
    perfect = {"W_enc": torch.cat([torch.eye(32), -torch.eye(32)], 1), "b_enc": torch.zeros(64)}
    perfect |= {"W_dec": torch.cat([torch.eye(32), -torch.eye(32)]), "b_dec": torch.zeros(32)}
    found = quality(model, SAE("standard", perfect, site), rows).numbers
    assert found["fvu"] < 1e-10 and found["l0"] == pytest.approx(32, abs=0.1)
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], abs=1e-5)
    nothing = {k: torch.zeros_like(v) for k, v in perfect.items()} | {"b_dec": x.mean(0)}
    found = quality(model, SAE("standard", nothing, site), rows).numbers
    assert found["fvu"] == pytest.approx(1, abs=1e-5) and found["dead"] == 1 and found["l0"] == 0
    assert found["ce_spliced"] == pytest.approx(found["ce_mean"], abs=1e-5)
    losses = []
    for row in rows.ids:
        logits = model.logits(row[None])[0, 1:-1].log_softmax(-1)
        losses += [-float(v) for v in logits.gather(1, row[2:, None])[:, 0]]
    assert found["ce_clean"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_what_is_won_back_is_a_share_of_what_the_ablation_costs_tokens_counted_alike() -> None:
    table = pd.DataFrame(
        {
            "tokens": [3, 1] * 8,
            "clean": [2.0, 4.0] * 8,
            "spliced": [2.5, 5.0] * 8,
            "zero": [9.0] * 16,
            "mean": [2.4] * 16,
        }
    )
    found = recovered(table)  # means over tokens: 2.5, 3.125, 9, 2.4
    assert found["ce_clean"] == pytest.approx(2.5) and found["ce_spliced"] == pytest.approx(3.125)
    share = found["recovered_zero"]
    assert share["mean"] == pytest.approx((9 - 3.125) / (9 - 2.5)) and share["low"] < share["mean"] < share["high"]
    assert found["recovered_mean"]["mean"] is None  # the ablation costs nothing


def test_a_feature_is_told_by_where_it_fires_and_what_it_makes_likelier() -> None:
    model, site = spoken("llama"), Site("resid_post", 2)
    rows = prompt_rows(model, [words(*range(i, i + 9)) for i in range(3, 40, 6)])
    found = gather(model, site, rows)
    sae = SAE("standard", weights("standard"), site)
    (one,) = meanings(model, sae, [11], rows, found, shown=4)
    values = sae.encode(found.x)[:, 11]
    at = int(values.argmax())
    assert one.texts["value"][0] == pytest.approx(float(values[at]))
    assert one.texts["token"][0].strip() == model.tokenizer.decode([int(rows.ids[found.row[at]][found.position[at]])])
    assert one.texts["row"].is_unique and one.texts["value"].is_monotonic_decreasing
    assert one.density == pytest.approx(float((values > 0).float().mean()))
    # The logits' change under a tiny push, with the norm's scale divided out, is the effect.
    effects = logit_effects(model, sae, 11)
    base = found.x[:1]
    scale = float(model.anatomy.main.final_norm.scale(base))
    pushed = model.anatomy.main.final_norm.linear(base + sae.W_dec[11], torch.tensor(scale))
    plain = model.anatomy.main.final_norm.linear(base, torch.tensor(scale))
    change = (model.head(pushed) - model.head(plain))[0] / scale
    assert torch.allclose(effects, change - change.mean(), atol=1e-3)
    assert one.up[0][1] == pytest.approx(float(effects.max()), abs=1e-5)


# -- places, and refusals


def test_places_have_the_names_of_parts_and_of_hooks() -> None:
    for text in ("L3.resid_post", "L3.z", "L3.neurons", "L3.MLP", "L3.attn", "L3.resid_mid"):
        site = parse_place(text)
        assert place_name(site) == text and parse_place(hook_name(site)) == site
    with pytest.raises(PartError, match="all of it, such as L3.z"):
        parse_place("L3.H2")
    with pytest.raises(PartError, match="blocks L0 to L2"):
        train_sae(spoken("llama"), "L9.resid_post", prompts=["w1"] * 9)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = spoken("llama")
    texts = [words(*range(i, i + 9)) for i in range(3, 40, 2)]
    for keywords, why in (
        ({"prompts": texts[:3]}, "3 prompts are too few"),
        ({}, "on a corpus or on prompts"),
        ({"prompts": texts, "recipe": SAERecipe(width=400)}, "135 tokens are too few to train 400 features.*1,600"),
        ({"prompts": texts, "recipe": SAERecipe(width=20, k=32)}, "--width above k"),
    ):
        with pytest.raises(VesaliusError, match=why):
            train_sae(model, "L1.resid_post", out=tmp_path, **keywords)  # type: ignore[arg-type]
    (tmp_path / "short.txt").write_text("w1 w2 w3\n\nw4 w5 w6\n")
    with pytest.raises(VesaliusError, match="tokens"):
        train_sae(model, "L1.resid_post", tmp_path / "short.txt", SAERecipe(length=16), out=tmp_path)
    broken = Model.wrap(tiny("llama").hf, model.tokenizer, name="broken")
    with torch.no_grad():
        broken.anatomy.block(0).down.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity at L1.resid_post in .* tokens"):
        train_sae(broken, "L1.resid_post", prompts=texts, recipe=SAERecipe(width=20, k=4), out=tmp_path)


def test_a_run_that_was_stopped_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vesalius.features.dictionaries import sitting

    model = spoken("llama")
    texts = [words(*range(i, i + 9)) for i in range(3, 60, 2)]
    recipe = SAERecipe(width=24, k=4, batch=32, passes=4, resample=5, lr=1e-2)
    whole = train_sae(model, "L1.resid_post", prompts=texts, recipe=recipe, out=tmp_path / "a")
    monkeypatch.setattr(sitting, "SAVE_SECONDS", -1.0)  # after every step

    class Stopped(Exception):
        pass

    real, seen = sitting.Trainer.step, []

    def step(self: object) -> object:
        seen.append(1)
        if len(seen) == 13:
            raise Stopped
        return real(self)  # type: ignore[arg-type]

    monkeypatch.setattr(sitting.Trainer, "step", step)
    with pytest.raises(Stopped):
        train_sae(model, "L1.resid_post", prompts=texts, recipe=recipe, out=tmp_path / "b")
    again = train_sae(model, "L1.resid_post", prompts=texts, recipe=recipe, out=tmp_path / "b")
    for name in ("sae_weights.safetensors", "cfg.json"):
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name
    assert not (again / "steps").exists() and SAE.load(again, model).k == 4
