"""Models: one example in, logits out; the user's own by name; BatchNorm refused."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.app import models

pytestmark = pytest.mark.slow


def logits(model, key, shape):
    example = jnp.ones(shape)
    params = models.init(model, key, example, num_classes=10)
    return model.apply({"params": params}, example)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_maps_one_example_to_logits(key, name, shape):
    assert jax.eval_shape(lambda k: logits(models.by_name(name, 10), k, shape), key).shape == (10,)


def test_mlp_takes_plain_features_too(key):
    assert logits(models.mlp(10, hidden=[4]), key, (7,)).shape == (10,)


def test_the_papers_mlp_has_the_papers_number_of_parameters(key):
    model = models.mlp(10, hidden=[2048] * 4)
    shapes = jax.eval_shape(lambda k: models.init(model, k, jnp.zeros([32, 32, 3])), key)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 18_903_050


@pytest.mark.parametrize(("initializer", "std"), [("he", np.sqrt(2 / 784)), ("paper", 0.01)])
def test_initializers_have_their_standard_deviation(key, initializer, std):
    params = models.init(models.mlp(10, hidden=[256], initializer=initializer), key, jnp.zeros([28, 28, 1]))
    # 200,704 weights: the standard error of their deviation is 0.16 %.
    np.testing.assert_allclose(params["Dense_0"]["kernel"].std(), std, rtol=0.01)
    assert not params["Dense_0"]["bias"].any()


@pytest.mark.parametrize("model", [models.mlp(10, hidden=[16]), models.cnn(10)], ids=["mlp", "cnn"])
def test_trains_under_vmap_of_grad(key, model):
    params = models.init(model, key, jnp.ones([8, 8, 1]))
    grad = jax.jit(jax.vmap(jax.grad(lambda p, x: model.apply({"params": p}, x).sum()), (None, 0)))
    grads = grad(params, jnp.ones([3, 8, 8, 1]))
    assert all(leaf.shape[0] == 3 and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(10)(x))


def test_batch_norm_is_refused_with_advice(key):
    with pytest.raises(ValueError, match=r"batch_stats.*LayerNorm or GroupNorm"):
        models.init(Normed(), key, jnp.ones([4]))


def test_dropout_is_refused_with_advice(key):
    model = nn.Sequential([nn.Dense(10), nn.Dropout(0.5, deterministic=False)])
    with pytest.raises(ValueError, match="dropout left out or deterministic"):
        models.init(model, key, jnp.ones([4]))


def test_logits_of_another_shape_are_refused(key):
    with pytest.raises(ValueError, match=r"logits of shape \(7,\), got \(10,\)"):
        models.init(models.mlp(10), key, jnp.ones([8, 8, 1]), num_classes=7)


def test_cnn_on_features_without_height_and_width_says_so(key):
    with pytest.raises(ValueError, match=r"one image \[height, width, channels\], got shape \(7,\)"):
        models.init(models.cnn(10), key, jnp.ones([7]))


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "import flax.linen as nn\n"
        "def factory(num_classes):\n    return nn.Dense(num_classes)\n"
        "def nothing(num_classes):\n    return None\n"
        "def no_arguments():\n    return nn.Dense(10)\n"
        "number = 3\n"
    )
    (tmp_path / "own_broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


@pytest.mark.usefixtures("own_module")
def test_a_users_factory_is_imported_from_the_current_folder(key):
    assert logits(models.by_name("own_models:factory", 10), key, (4,)).shape == (10,)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet", ValueError, "unknown model 'resnet': expected mlp, cnn or 'pkg.module:factory'"),
        ("own_models:", ValueError, "expected 'pkg.module:name'"),
        ("not_there:factory", ImportError, "cannot import 'not_there'"),
        ("own_broken:factory", ImportError, "No module named 'a_module_that_is_not_there'"),
        ("own_models:missing", AttributeError, "has no 'missing'"),
        ("own_models:number", TypeError, "expected a function, got int"),
        ("own_models:nothing", TypeError, "got NoneType"),
        ("own_models:no_arguments", TypeError, "cannot be called with"),
    ],
)
def test_wrong_references_are_told(name, error, message):
    with pytest.raises(error, match=message):
        models.by_name(name, 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": [0]}, ValueError, "at least 1"),
        ({"initializer": "hee"}, ValueError, "expected 'he' or 'paper'"),
        ({"depth": 3}, TypeError, "unexpected keyword argument 'depth'"),
    ],
)
def test_wrong_options_are_told(options, error, message):
    with pytest.raises(error, match=message):
        models.by_name("mlp", 10, **options)


def test_no_classes_is_told():
    with pytest.raises(ValueError, match="num_classes of at least 1"):
        models.mlp(0)
