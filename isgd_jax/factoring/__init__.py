"""How a per-example gradient is kept in factors: found in the program of `jax.grad`, planned, and asked.

From the bottom: `program` reads jaxprs (all that is private to JAX), `factors` and `contraction` describe what is kept,
`cuts` finds it (inside loops and branches with `regions`), `costs` decides how it is asked, `terms` answers for one
contraction, `factored` is the lazy leaf and what can be asked of it, `plans` puts it together for a batch. Users meet
it as `isgd_jax.gradients`.
"""
