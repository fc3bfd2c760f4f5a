"""hallsim: a solver that is pinned, and an adjoint, are arguments of the scheduler."""

import diffrax as dfx
import jax
import jax.numpy as jnp
from hallsim.composite import Composite
from hallsim.process import Port, PortRole, Process
from hallsim.scheduler import Scheduler

import reversax as rvx


class Decay(Process):
    rate: float = 0.5

    def ports_schema(self):
        return {"x": Port(role=PortRole.EVOLVED, default=1.0)}

    def derivative(self, t, state):
        return {"x": -self.rate * state["x"] ** 2}


composite = Composite(processes={"decay": Decay()}, topology={"decay": {"x": "pool/x"}})


def loss(rate, adjoint):
    solver = rvx.Reversible(dfx.Tsit5(), rvx.Symmetric(halvings_per_step=4))
    scheduler = Scheduler(solver=solver, adjoint=adjoint, dt0=0.1)
    changed = composite.with_params({"decay.rate": rate})
    return scheduler.run(changed, t_span=(0.0, 4.0), save_dt=1.0).get("pool/x").sum()


gradient = jax.grad(loss)(jnp.array(0.5), rvx.ReversibleAdjoint())
checkpointed = jax.grad(loss)(jnp.array(0.5), None)
print(gradient, checkpointed)
