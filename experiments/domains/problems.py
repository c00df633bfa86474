"""What is solved: equations by physics-informed networks, and photographs by neural fields.

* ``burgers``: u_t + u u_x = (0.01 / pi) u_xx on [0, 1] x [-1, 1], u(0, x) = -sin(pi x), u(t, -1) = u(t, 1) = 0, the
  initial and boundary values as a term of the loss. Exact by the Cole-Hopf transform and Gauss-Hermite quadrature.
* ``allen_cahn``: u_t = 1e-4 u_xx + 5 u - 5 u^3, u(0, x) = x^2 cos(pi x), u(t, -1) = u(t, 1) = -1, both built into the
  network's output (Wu et al. 2023). Reference by 4,096 Fourier modes and ETDRK4 (Kassam & Trefethen 2005).
* ``poisson``: -Δu = f on [-1, 1]^2 with u = 0 at the border, built in; f belongs to a peak of width 0.07, so that the
  solution is known.
* ``siren/china``, ``fourier/flower``, ...: a photograph of scikit-learn at half size, as a function of place.

The error is relative L2, of photographs the root mean square: 30 dB are 0.0316.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["DOMAINS", "Domain", "Term", "burgers", "domain", "glorot", "loss_of"]

Params = Any
Array = jax.Array


class Term(NamedTuple):
    """A term of a loss: the mean over points of ``weight * |residual|^2``."""

    residual: Callable[[Params, Array], Array]
    """Of one point, a number or a vector."""
    place: Callable[[Array], Array]
    """Points of the unit cube [k, dims] to points [k, d]: uniform ones stay uniform."""
    dims: int
    weight: float
    batch: int
    """Points of a plain batch."""
    kept: int
    """Points of an arm that keeps a set of them, such as RAD."""
    all_points: Array | None = None
    """All that there are, where they are a finite list such as pixels."""
    nearest: Callable[[Array], Array] | None = None
    """Of such a list, the point in whose cell each of the points [k, d] lies; cells are of one size."""

    def draw(self, key: Array, count: int) -> Array:
        """Independent uniform points [count, d]."""
        if self.all_points is not None:
            return self.all_points[jax.random.randint(key, (count,), 0, len(self.all_points))]
        return self.place(jax.random.uniform(key, (count, self.dims), jnp.float32))

    def spread(self, unit: Array) -> Array:
        """Points [k, d] for those of the unit cube [k, dims]; of a finite list the one in whose cell each falls."""
        at = self.place(unit)
        return at if self.nearest is None else self.nearest(at)


class Domain(NamedTuple):
    """A problem: its terms, the network, and how far a network is from the truth."""

    name: str
    terms: dict[str, Term]
    init: Callable[[Array], Params]
    value: Callable[[Params, Array], Array]
    """The network at one point."""
    error: Callable[[Params], Array]
    levels: tuple[float, ...]
    """Errors whose times of arrival are told, the first to be reached first."""
    truth: np.ndarray
    """On a grid, for pictures."""
    grid: np.ndarray
    """Its points [.., .., d]."""


def loss_of(term: Term) -> Callable[[Params, Array], Array]:
    """The loss of one point of a term."""
    return lambda params, point: term.weight * jnp.sum(jnp.square(term.residual(params, point)))


def glorot(widths: tuple[int, ...]) -> Callable[[Array], Params]:
    """First parameters of a network: normal weights by its widths, zero biases."""

    def init(key: Array) -> Params:
        keys = jax.random.split(key, len(widths) - 1)
        pairs = zip(keys, widths[:-1], widths[1:], strict=True)
        return [(jax.random.normal(k, (i, o)) * np.sqrt(2 / (i + o)), jnp.zeros(o)) for k, i, o in pairs]

    return init


def _mlp(params: Params, value: Array, activation: Callable[[Array], Array] = jnp.tanh) -> Array:
    for w, b in params[:-1]:
        value = activation(value @ w + b)
    w, b = params[-1]
    return value @ w + b


def _relative(value: Callable[[Params, Array], Array], grid: np.ndarray, truth: np.ndarray) -> Callable[..., Array]:
    points = jnp.asarray(grid.reshape(-1, grid.shape[-1]), jnp.float32)
    wanted = jnp.asarray(truth.ravel(), jnp.float32)

    def error(params: Params) -> Array:
        found = jax.vmap(value, (None, 0))(params, points)
        return jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)

    return error


def _slopes(
    value: Callable[..., Array], params: Params, point: Array, derivative: Callable[..., Any] | None = None
) -> tuple[Array, Array, Array, Array]:
    """u, u_t, u_x and u_xx at (t, x).

    By `jax.jvp` twice over, which is the cheapest for plain and for drawn points, or by nested derivatives of another
    kind: `jax.grad` or `jax.jacfwd`.
    """
    t, x = point

    def u(t: Array, x: Array) -> Array:
        return value(params, jnp.stack([t, x]))

    if derivative is not None:
        u_x = derivative(u, 1)
        return u(t, x), derivative(u, 0)(t, x), u_x(t, x), derivative(u_x, 1)(t, x)
    one = jnp.ones_like(x)
    (here, u_x), (_, u_xx) = jax.jvp(lambda x: jax.jvp(lambda x: u(t, x), (x,), (one,)), (x,), (one,))
    _, u_t = jax.jvp(lambda t: u(t, x), (t,), (one,))
    return here, u_t, u_x, u_xx


def _strip(unit: Array) -> Array:
    """[0, 1]^2 to t in [0, 1] and x in [-1, 1]."""
    return unit * jnp.array([1.0, 2.0]) - jnp.array([0.0, 1.0])


def burgers(derivative: Callable[..., Any] | None = None) -> Domain:
    """Burgers' equation, its residual by the cheapest derivatives, or by nested ones of another kind."""
    nu = 0.01 / np.pi

    def value(params: Params, point: Array) -> Array:
        return _mlp(params, point)[0]

    def residual(params: Params, point: Array) -> Array:
        u, u_t, u_x, u_xx = _slopes(value, params, point, derivative)
        return u_t + u * u_x - nu * u_xx

    def missing(params: Params, point: Array) -> Array:
        t, x = point
        return value(params, point) - jnp.where(t == 0.0, -jnp.sin(jnp.pi * x), 0.0)

    def border(unit: Array) -> Array:  # a half at t = 0, a quarter at each end
        which, where = unit[:, 0], unit[:, 1]
        x = jnp.where(which < 0.5, 2 * where - 1, jnp.where(which < 0.75, -1.0, 1.0))
        return jnp.stack([jnp.where(which < 0.5, 0.0, where), x], axis=1)

    t, x = np.meshgrid(np.linspace(0.01, 1.0, 100), np.linspace(-1, 1, 256), indexing="ij")
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    at = x[..., None] - np.sqrt(4 * nu * t)[..., None] * nodes
    damping = weights * np.exp(-np.cos(np.pi * at) / (2 * np.pi * nu) - 1 / (2 * np.pi * nu))
    truth = -np.sum(np.sin(np.pi * at) * damping, axis=-1) / np.sum(damping, axis=-1)
    terms = {
        "inside": Term(residual, _strip, 2, 1.0, 192, 2_048),
        "border": Term(missing, border, 2, 10.0, 64, 512),
    }
    grid = np.stack([t, x], axis=-1)
    init = glorot((2, 32, 32, 32, 32, 1))
    return Domain("burgers", terms, init, value, _relative(value, grid, truth), (0.1, 0.01, 0.001), truth, grid)


def _allen_cahn() -> Domain:
    diffusion = 1e-4

    def value(params: Params, point: Array) -> Array:
        t, x = point
        return jnp.square(x) * jnp.cos(jnp.pi * x) + t * (1 - jnp.square(x)) * _mlp(params, point)[0]

    def residual(params: Params, point: Array) -> Array:
        u, u_t, _, u_xx = _slopes(value, params, point)
        return u_t - diffusion * u_xx - 5 * u + 5 * u**3

    times, places, truth = allen_cahn_reference(diffusion)
    grid = np.stack(np.meshgrid(times, places, indexing="ij"), axis=-1)
    terms = {"inside": Term(residual, _strip, 2, 1.0, 256, 2_048)}
    init = glorot((2, 32, 32, 32, 32, 1))
    return Domain("allen_cahn", terms, init, value, _relative(value, grid, truth), (0.1, 0.01, 0.001), truth, grid)


def allen_cahn_reference(diffusion: float, num_steps: int = 2_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times [101], places [256] and u on their grid, float64.

    u + 1 vanishes at both ends; continued oddly about them it has period 4, and Fourier modes.
    """
    half = 2_048
    x = -1 + 2 * np.arange(half) / half
    k = 2 * np.pi * np.fft.rfftfreq(2 * half, d=2 / half)
    dt = 1.0 / num_steps
    linear = -diffusion * k**2
    # ETDRK4, the coefficients by means over a circle.
    circle = np.exp(1j * np.pi * (np.arange(1, 33) - 0.5) / 32)
    z = dt * linear[:, None] + circle
    full, mid = np.exp(dt * linear), np.exp(dt * linear / 2)
    q = dt * np.mean((np.exp(z / 2) - 1) / z, axis=1).real
    f1 = dt * np.mean((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3, axis=1).real
    f2 = dt * np.mean((2 + z + np.exp(z) * (z - 2)) / z**3, axis=1).real
    f3 = dt * np.mean((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3, axis=1).real

    def odd(v: np.ndarray) -> np.ndarray:  # on [-1, 3), zero at -1 and 1
        mirrored = -np.concatenate([[0.0], v[:0:-1]])
        return np.concatenate([v, mirrored])

    def slope(modes: np.ndarray) -> np.ndarray:
        u = np.fft.irfft(modes)[:half] - 1
        return np.fft.rfft(odd(5 * u - 5 * u**3))

    modes = np.fft.rfft(odd(x**2 * np.cos(np.pi * x) + 1))
    rows = [x**2 * np.cos(np.pi * x)]
    for step in range(num_steps):
        n0 = slope(modes)
        a = mid * modes + q * n0
        na = slope(a)
        b = mid * modes + q * na
        nb = slope(b)
        c = mid * a + q * (2 * nb - n0)
        nc = slope(c)
        modes = full * modes + n0 * f1 + 2 * (na + nb) * f2 + nc * f3
        if (step + 1) % (num_steps // 100) == 0:
            rows.append(np.fft.irfft(modes)[:half] - 1)
    every = half // 256
    return np.linspace(0, 1, 101), x[::every], np.stack(rows)[:, ::every]


def _poisson() -> Domain:
    sharp, center = 100.0, jnp.array([0.3, 0.2])

    def peak(point: Array) -> Array:
        return jnp.exp(-sharp * jnp.sum(jnp.square(point - center)))

    def value(params: Params, point: Array) -> Array:
        return jnp.prod(1 - jnp.square(point)) * _mlp(params, point)[0]

    def residual(params: Params, point: Array) -> Array:
        def along(direction: Array) -> Array:
            def slope(p: Array) -> Array:
                return jax.jvp(lambda p: value(params, p), (p,), (direction,))[1]

            return jax.jvp(slope, (point,), (direction,))[1]

        curvatures = [along(direction) for direction in jnp.eye(2)]
        squares = jnp.sum(jnp.square(point - center))
        source = (4 * sharp - 4 * sharp**2 * squares) * peak(point)
        return (sum(curvatures) + source) / 100.0  # of about the size of u

    x = np.linspace(-1, 1, 161)
    grid = np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1)
    truth = np.exp(-sharp * np.sum((grid - np.asarray(center)) ** 2, axis=-1))
    terms = {"inside": Term(residual, lambda unit: 2 * unit - 1, 2, 1.0, 256, 2_048)}
    init = glorot((2, 32, 32, 32, 32, 1))
    return Domain("poisson", terms, init, value, _relative(value, grid, truth), (0.1, 0.01, 0.001), truth, grid)


def photograph(name: str) -> np.ndarray:
    """A photograph of scikit-learn at half size, [rows, columns, 3] from 0 to 1."""
    from sklearn.datasets import load_sample_image

    image = load_sample_image(f"{name}.jpg").astype(np.float32) / 255
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    return image[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, 3).mean(axis=(1, 3))


def _field(name: str) -> Domain:
    kind, picture = name.split("/")
    image = photograph(picture)
    rows, columns = image.shape[:2]
    colors = jnp.asarray(image)
    # The middle of each pixel, both coordinates from -1 to 1 along the longer side.
    long = max(rows, columns)
    y, x = np.meshgrid(np.arange(rows) - (rows - 1) / 2, np.arange(columns) - (columns - 1) / 2, indexing="ij")
    grid = np.stack([y, x], axis=-1).astype(np.float32) * (2 / long)

    init, value = _siren() if kind == "siren" else _fourier_features()

    def color(point: Array) -> Array:
        at = jnp.round(point * (long / 2) + jnp.array([(rows - 1) / 2, (columns - 1) / 2])).astype(jnp.int32)
        return colors[jnp.clip(at[0], 0, rows - 1), jnp.clip(at[1], 0, columns - 1)]

    def residual(params: Params, point: Array) -> Array:
        return value(params, point) - color(point)

    everywhere = jnp.asarray(grid.reshape(-1, 2))

    def error(params: Params) -> Array:
        squares = jax.lax.map(lambda p: jnp.sum(jnp.square(residual(params, p))), everywhere, batch_size=4_096)
        return jnp.sqrt(jnp.mean(squares) / 3)

    limits, middle = jnp.array([rows / long, columns / long]), jnp.array([(rows - 1) / 2, (columns - 1) / 2])

    def nearest(points: Array) -> Array:
        at = jnp.clip(jnp.round(points * (long / 2) + middle), 0, jnp.array([rows - 1, columns - 1]))
        return (at - middle) * (2 / long)

    term = Term(
        residual, lambda unit: (2 * unit - 1) * limits, 2, 1.0, 1_024, len(everywhere) // 4, everywhere, nearest
    )
    return Domain(name, {"pixels": term}, init, value, error, (10**-1.25, 10**-1.5, 10**-1.75), image, grid)


def _siren(width: int = 128, depth: int = 3, omega: float = 30.0) -> tuple[Any, Any]:
    """Sitzmann et al. 2020."""

    def init(key: Array) -> Params:
        sizes = (2, *[width] * depth, 3)
        keys = jax.random.split(key, len(sizes) - 1)
        params = []
        for place, (k, i, o) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True)):
            bound = 1 / i if place == 0 else np.sqrt(6 / i) / omega
            params.append((jax.random.uniform(k, (i, o), minval=-bound, maxval=bound), jnp.zeros(o)))
        return params

    def value(params: Params, point: Array) -> Array:
        return _mlp(params, point, lambda x: jnp.sin(omega * x)) + 0.5

    return init, value


def _fourier_features(width: int = 128, depth: int = 3, scale: float = 10.0) -> tuple[Any, Any]:
    """Tancik et al. 2020; the directions are the same for all seeds."""
    directions = scale * jax.random.normal(jax.random.key(5), (2, width // 2))
    inner = glorot((width, *[width] * depth, 3))

    def value(params: Params, point: Array) -> Array:
        turns = 2 * jnp.pi * (point @ directions)
        return _mlp(params, jnp.concatenate([jnp.sin(turns), jnp.cos(turns)]), jax.nn.relu) + 0.5

    return inner, value


DOMAINS: dict[str, Callable[[], Domain]] = {
    "burgers": burgers,
    "allen_cahn": _allen_cahn,
    "poisson": _poisson,
    **{
        name: functools.partial(_field, name)
        for name in ("siren/china", "siren/flower", "fourier/china", "fourier/flower")
    },
}


@functools.cache
def domain(name: str) -> Domain:
    """A problem by its name, made once."""
    return DOMAINS[name]()
