"""What a plan calls a hit, what it blames a miss on, and that nothing is built twice."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

import toolchain
from tests.tiny import RECIPE
from toolchain.builder.assemble import assemble, sampler_file
from toolchain.builder.plan import Plan
from toolchain.builder.steps import StepId
from toolchain.errors import RecipeError, SamplerError, StoreError, UsageError
from toolchain.store.artifacts import Store


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def misses(plan: Plan) -> list[str]:
    return [step.name for step in plan.steps if not step.hit]


@pytest.fixture(scope="module")
def own_store(
    tiny_bundle: Path, tiny_recipe: Path, tiny_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A store of what `tiny_bundle` was built from and no more: other workers put anything into the shared one."""
    own = tmp_path_factory.mktemp("own") / "store"
    for step in toolchain.plan_build(tiny_recipe, str(tiny_model), store=store).steps:
        built = store / step.stage / step.key  # maybe by another test, under its recipe's name
        Store(own).get_or_build(step.stage, step.subject, step.inputs, partial(copy_files, built))
    return own


def copy_files(built: Path, folder: Path) -> None:
    shutil.copytree(built, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))


@pytest.fixture
def built(own_store: Path, tiny_model: Path) -> dict[str, object]:
    """Arguments of `plan_build` for the model that `tiny_bundle` was built from."""
    return {"model": str(tiny_model), "store": own_store}


def test_a_second_build_is_all_hits(built: dict[str, str], tiny_recipe: Path) -> None:
    assert misses(toolchain.plan_build(tiny_recipe, **built)) == []  # type: ignore[arg-type]


def test_a_new_bucket_builds_only_what_belongs_to_it(built: dict[str, str], tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.toml", RECIPE.replace('"2x64x96"]', '"2x64x96", "1x96x64"]'))
    assert misses(toolchain.plan_build(recipe, **built)) == [  # type: ignore[arg-type]
        "graph tiny denoiser 1x96x64",
        "graph tiny vae_decoder 1x96x64",
        "graph tiny vae_encoder 1x96x64",
        "engine tiny denoiser 1x96x64",
        "engine tiny vae_decoder 1x96x64",
        "engine tiny vae_encoder 1x96x64",
    ]


def test_sampling_defaults_rebuild_nothing(built: dict[str, str], tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.toml", RECIPE.replace("guidance = 5.0", "guidance = 3.0"))
    assert misses(toolchain.plan_build(recipe, **built)) == []  # type: ignore[arg-type]


def test_a_new_step_count_compiles_its_tables_alone(built: dict[str, str], tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.toml", RECIPE.replace("step_counts = [4]", "step_counts = [4, 6]"))
    plan = toolchain.plan_build(recipe, **built)  # type: ignore[arg-type]
    assert misses(plan) == [f"sampler tiny {name}" for name in ("euler", "model", "euler-a")]
    assert set(plan.step(StepId("sampler", "euler")).reasons) == {'steps: "4" -> "4,6"', 'required: "4" -> "4,6"'}


def test_a_range_leaves_out_what_a_scheduler_cannot_do(
    built: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = RECIPE.replace("step_counts = [4]", 'step_counts = ["49-52"]').replace('["model"', '["lcm", "model"')
    plan = toolchain.plan_build(write(tmp_path / "tiny.toml", text), **built)  # type: ignore[arg-type]
    phases: list[tuple[str, float | None]] = []
    plan.step(StepId("sampler", "lcm")).run({}, tmp_path, lambda phase, share: phases.append((phase, share)))
    tables = json.loads((tmp_path / "tables.json").read_text())
    assert {name: type(table) for name, table in tables.items()} == {
        **{f"lcm/{steps}": dict for steps in (49, 50)},
        **{f"lcm/{steps}": str for steps in (51, 52)},
    }
    assert "no tables of lcm for 51-52 steps" in caplog.text
    assert phases[1] == ("table 2 of 4", 0.25)
    asked = text.replace('["49-52"]', "[51]")
    plan = toolchain.plan_build(write(tmp_path / "tiny.toml", asked), **built)  # type: ignore[arg-type]
    with pytest.raises(SamplerError, match="refuses lcm with 51 steps"):
        plan.step(StepId("sampler", "lcm")).run({}, tmp_path, lambda phase, share: None)


def test_schedulers_whose_names_look_alike_have_files_of_their_own() -> None:
    specs = ["euler", "dpm++2m-sde", "dpm++2m:sde", "dpm++2m:karras,sde", "dpm++2m-karras-sde"]
    specs += [f"euler:sigmas={' '.join(map(str, range(n, 0, -1)))}" for n in (40, 80)]
    places = [sampler_file(spec) for spec in specs]
    assert len({*places}) == len(specs)
    assert places[0] == "samplers/euler.json"
    assert all(len(place) < 80 and " " not in place for place in places)


def test_a_miss_names_the_field_that_changed(built: dict[str, str], tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.toml", RECIPE + '\n[components.vae_decoder]\ndtype = "float16"\n')
    plan = toolchain.plan_build(recipe, **built)  # type: ignore[arg-type]
    step = plan.step(StepId("graph", "vae_decoder", "1x64x64"))
    assert not step.hit
    assert step.reasons == ('recipe.dtype: "float32" -> "float16"',)
    assert plan.step(StepId("graph", "denoiser", "1x64x64")).hit


def test_changed_weights_change_weights_and_engines_but_no_graph(
    built: dict[str, str], tiny_copy: Path, tiny_recipe: Path
) -> None:
    file = tiny_copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x01
    file.write_bytes(data)
    plan = toolchain.plan_build(tiny_recipe, str(tiny_copy), store=built["store"])  # type: ignore[arg-type]
    assert {step.split()[0] for step in misses(plan)} == {"weights", "packed", "engine"}
    assert all("denoiser" in step for step in misses(plan))
    assert any("checkpoint" in line for line in plan.step(StepId("weights", "denoiser")).reasons)


def test_keys_name_the_family_and_the_component(built: dict[str, str], tiny_recipe: Path) -> None:
    """SD's and SDXL's first text encoders may have one config, and different wrappers: they give other layers."""
    plan = toolchain.plan_build(tiny_recipe, **built)  # type: ignore[arg-type]
    for step in plan.steps:
        if step.stage in ("graph", "weights"):
            assert (step.inputs["family"], step.inputs["component"]) == ("sd", step.id.component)


def test_a_second_bucket_writes_no_weight_again(
    tiny_bundle: Path, own_store: Path, tiny_recipe: Path, tiny_model: Path
) -> None:
    """What a bucket adds is its graph: nothing the size of a weight lies beside it."""
    plan = toolchain.plan_build(tiny_recipe, str(tiny_model), store=own_store)
    weights = Store(own_store).lookup("weights", plan.step(StepId("weights", "denoiser")).key)
    assert weights is not None
    total = sum(record.size for record in weights.files.values())
    for bucket in ("1x64x64", "2x64x96"):
        engine = Store(own_store).lookup("engine", plan.step(StepId("engine", "denoiser", bucket)).key)
        assert engine is not None
        assert set(engine.files) == {"graph.onnx", "engine.json"}
        assert sum(record.size for record in engine.files.values()) < 0.3 * total


def test_a_build_onto_other_files_is_refused_before_any_work(
    tiny_recipe: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="other files, not a bundle"):
        toolchain.build(tiny_recipe, str(tiny_model), output, store=tmp_path / "store")
    assert (output / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "store").exists()


def test_changed_defaults_reach_the_bundle_though_every_artifact_is_a_hit(
    built: dict[str, str], bundle_copy: Path, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "tiny.toml", RECIPE.replace("guidance = 5.0", "guidance = 3.0"))
    bundle = toolchain.build(recipe, built["model"], bundle_copy, store=Path(built["store"]))
    assert bundle.recipe.sampling.guidance == 3.0


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x01
    path.chmod(0o644)
    path.write_bytes(data)


def damage_weights(own: Path, plan: Plan) -> None:
    flip_last_byte(next((own / "weights" / plan.step(StepId("weights", "denoiser")).key).glob("*.safetensors")))


def test_a_damaged_artifact_reaches_no_bundle(
    tiny_bundle: Path, tiny_recipe: Path, tiny_model: Path, own_store: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(own_store, tmp_path / "store", ignore=shutil.ignore_patterns(".tmp")))
    damage_weights(own, toolchain.plan_build(tiny_recipe, str(tiny_model), store=own))
    with pytest.raises(StoreError, match="damaged") as error:
        toolchain.build(tiny_recipe, str(tiny_model), tmp_path / "bundle", store=own)
    assert "cache verify --quarantine" in str(error.value)
    assert not (tmp_path / "bundle").exists()


def test_what_a_step_reads_is_verified_before_it_runs(
    tiny_bundle: Path, tiny_recipe: Path, tiny_model: Path, own_store: Path, tmp_path: Path
) -> None:
    """Damage that keeps the size is no miss: packed into another artifact it would be under a digest of its own."""
    own = Path(shutil.copytree(own_store, tmp_path / "store", ignore=shutil.ignore_patterns(".tmp")))
    plan = toolchain.plan_build(tiny_recipe, str(tiny_model), store=own)
    damage_weights(own, plan)
    for stage in ("packed", "engine"):
        shutil.rmtree(own / stage, ignore_errors=True)
    with pytest.raises(StoreError, match="weights tiny denoiser is damaged") as error:
        toolchain.build(tiny_recipe, str(tiny_model), tmp_path / "bundle", store=own)
    assert error.value.hint == f"diffbuild cache verify --quarantine --store {own}, then build again"
    lost = [s for s in plan.steps if s.stage in ("packed", "engine") and s.id.component == "denoiser"]
    assert [Store(own).lookup(s.stage, s.key) for s in lost] == [None] * len(lost)


def test_every_step_names_what_it_reads(built: dict[str, str], tiny_recipe: Path) -> None:
    plan = toolchain.plan_build(tiny_recipe, **built)  # type: ignore[arg-type]
    before: set[StepId] = set()
    for step in plan.steps:
        assert before.issuperset(step.needs)
        assert bool(step.needs) == (step.stage in ("weights", "packed", "engine"))
        before.add(step.id)


def test_what_is_quickly_refused_comes_first(built: dict[str, str], tiny_recipe: Path) -> None:
    plan = toolchain.plan_build(tiny_recipe, **built)  # type: ignore[arg-type]
    stages = list(dict.fromkeys(step.stage for step in plan.steps))
    assert stages[:3] == ["tokenizer", "sampler", "graph"]


def test_the_number_of_threads_rebuilds_nothing(built: dict[str, str], tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.toml", RECIPE + "\n[onnxruntime]\nthreads = 3\n")
    plan = toolchain.plan_build(recipe, **built)  # type: ignore[arg-type]
    assert plan.recipe.to_json()["onnxruntime"]["threads"] == 3
    assert misses(plan) == []


def test_a_flipped_byte_in_a_bundle_is_repaired(
    tiny_recipe: Path, tiny_model: Path, own_store: Path, bundle_copy: Path
) -> None:
    flip_last_byte(bundle_copy / "engines" / "denoiser" / "weights.safetensors")
    toolchain.build(tiny_recipe, str(tiny_model), bundle_copy, store=own_store)
    toolchain.read_bundle(bundle_copy).verify()


def test_a_build_with_nothing_to_do_registers_the_bundle_once(
    built: dict[str, str], tiny_recipe: Path, bundle_copy: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(built["store"], tmp_path / "store"))
    listed = own / ".bundles.json"
    inode = (bundle_copy / "bundle.json").stat().st_ino
    toolchain.build(tiny_recipe, built["model"], bundle_copy, store=own)
    assert (bundle_copy / "bundle.json").stat().st_ino == inode
    assert str(bundle_copy) in json.loads(listed.read_text())["bundles"]
    before = listed.stat().st_mtime_ns
    toolchain.build(tiny_recipe, built["model"], bundle_copy, store=own)
    assert listed.stat().st_mtime_ns == before


def test_a_bundle_is_no_excuse_for_what_the_store_lost(
    built: dict[str, str], tiny_recipe: Path, bundle_copy: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(built["store"], tmp_path / "store"))
    shutil.rmtree(own / "tokenizer")
    told: list[tuple[str, str]] = []
    toolchain.build(
        tiny_recipe, built["model"], bundle_copy, store=own, progress=lambda step, what: told.append((step.stage, what))
    )
    assert ("tokenizer", "built") in told
    assert misses(toolchain.plan_build(tiny_recipe, built["model"], store=own)) == []


@pytest.mark.parametrize("manifest", ["whole", "damaged"])
@pytest.mark.parametrize("name", ["notes.txt", "mine/a.png"])
def test_files_of_somebody_else_in_a_bundle_are_kept(
    built: dict[str, str], bundle_copy: Path, tmp_path: Path, name: str, manifest: str
) -> None:
    recipe = write(tmp_path / "tiny.toml", RECIPE.replace("guidance = 5.0", "guidance = 3.0"))
    if manifest == "damaged":
        (bundle_copy / "bundle.json").write_text("{")
    (bundle_copy / name).parent.mkdir(exist_ok=True)
    (bundle_copy / name).write_text("years of work")
    with pytest.raises(UsageError, match=f"holds other files(.|\n)*{name}"):
        toolchain.build(recipe, built["model"], bundle_copy, store=Path(built["store"]))
    plan = toolchain.plan_build(recipe, **built)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=f"refusing to replace(.|\n)*{name}"):
        assemble(plan, bundle_copy, lambda *_: {})
    (bundle_copy / name).unlink()
    toolchain.build(recipe, built["model"], bundle_copy, store=Path(built["store"])).verify()


def test_an_unlisted_file_among_the_engines_is_kept(
    built: dict[str, str], bundle_copy: Path, tiny_recipe: Path
) -> None:
    (bundle_copy / "engines" / "denoiser" / "notes.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"engines/denoiser/notes\.txt"):
        toolchain.build(tiny_recipe, built["model"], bundle_copy, store=Path(built["store"]))


def test_an_export_replaces_graphs_and_keeps_other_files(
    built: dict[str, str], tiny_recipe: Path, tmp_path: Path
) -> None:
    output = tmp_path / "graphs"
    toolchain.export_graphs(tiny_recipe, store=Path(built["store"]), model=built["model"], output=output)
    old = output / "denoiser-9x64x64.onnx"  # of a bucket that the recipe has no more
    old.touch()
    toolchain.export_graphs(tiny_recipe, store=Path(built["store"]), model=built["model"], output=output)
    assert not old.exists()
    write(output / "notes.txt", "years of work")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        toolchain.export_graphs(tiny_recipe, store=Path(built["store"]), model=built["model"], output=output)
    assert (output / "notes.txt").exists()


def test_a_damaged_bundle_is_put_together_again(
    tiny_recipe: Path, tiny_model: Path, own_store: Path, bundle_copy: Path
) -> None:
    (bundle_copy / "engines" / "denoiser" / "weights.safetensors").unlink()
    toolchain.build(tiny_recipe, str(tiny_model), bundle_copy, store=own_store)
    toolchain.read_bundle(bundle_copy).verify()


BAD_RECIPES = [
    ("", "[components.transformer]\ndtype = 'float16'\n", "components.transformer: unknown component"),
    ("", "[check.components.unet]\n", "check.components.unet: unknown component"),
    ("", "[components.denoiser]\ndtype = 'bfloat16'\n", "onnxruntime cannot run bfloat16"),
    ('scheduler = "euler"', 'scheduler = "eulr"', "sampling.schedulers"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD_RECIPES)
def test_recipes_that_do_not_fit(built: dict[str, str], tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    text = RECIPE.replace(old, new, 1) if old else RECIPE + new
    recipe = write(tmp_path / "tiny.toml", text)
    with pytest.raises(RecipeError) as error:
        toolchain.plan_build(recipe, **built)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_graphs_alone_need_no_weights(tiny_copy: Path, tiny_recipe: Path, own_store: Path, tmp_path: Path) -> None:
    for file in tiny_copy.rglob("*.safetensors"):
        file.unlink()
    graphs = toolchain.export_graphs(tiny_recipe, str(tiny_copy), tmp_path / "graphs", store=own_store)
    assert sorted(g.name for g in graphs) == [
        "denoiser-1x64x64.onnx",
        "denoiser-2x64x96.onnx",
        "text_encoder-any.onnx",
        "vae_decoder-1x64x64.onnx",
        "vae_decoder-2x64x96.onnx",
        "vae_encoder-1x64x64.onnx",
        "vae_encoder-2x64x96.onnx",
    ]
    weights = json.loads((tmp_path / "graphs" / "denoiser-1x64x64.weights.json").read_text())
    assert {"name", "key", "dtype", "shape", "transposed"} == set(weights[0])


def test_graphs_point_into_the_checkpoint_where_it_is_there(
    tiny_model: Path, tiny_recipe: Path, own_store: Path, tmp_path: Path
) -> None:
    toolchain.export_graphs(tiny_recipe, str(tiny_model), tmp_path / "graphs", store=own_store)
    weights = json.loads((tmp_path / "graphs" / "vae_decoder-1x64x64.weights.json").read_text())
    assert all(Path(entry["file"]).is_file() and entry["nbytes"] > 0 for entry in weights)
