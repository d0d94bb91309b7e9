"""Measure on their gradients whether the terms of the objective, and the domains, help or hinder each other.

Shape legend: see megatron_mcpo.types.
"""

from dataclasses import replace

from megatron_mcpo.algo import centering
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.trainer.objective import Objective, Prepared


def term_gradients(objective: Objective, policy: Policy, prepared: Prepared) -> dict[str, float]:
    """Return the gradients of each contrastive term with its weight, for TERM cross_domain and in_domain:

    gradient/z_TERM      norm of its gradient on the representations
    gradient/trunk_TERM  norm of its gradient on the model's weights, the head left out
    gradient/cos_TERM    cosine of that to the gradient of the policy term (KL included): below 0 they oppose each
                         other. Left out where one of them is 0.
    and gradient/trunk_policy. It takes a forward and backward pass for the policy term and each term that has a weight,
    and holds this rank's share of two gradients meanwhile, in fp32. No parameter moves. Collective over all ranks.
    """
    settings, scored, contrasted = objective.config.contrastive, prepared.scored, prepared.contrasted
    assert contrasted is not None
    alone = objective.loss(replace(prepared, contrasted=None))
    own = policy.trunk_gradient(scored.batch, alone, routes=scored.routes)
    own_norm = policy.dot(own, own) ** 0.5
    metrics = {"gradient/trunk_policy": own_norm}
    weights = {"cross_domain": settings.cross_domain_weight, "in_domain": settings.in_domain_weight}
    for term, other in (("cross_domain", "in_domain_weight"), ("in_domain", "cross_domain_weight")):
        if weights[term] == 0:
            continue
        labels = scored.batch.labels.to(contrasted.head_MD.device)
        _, term_alone = centering.contrast(contrasted.head_MD, labels, settings.model_copy(update={other: 0.0}))
        loss = objective.contrastive_loss(scored, term_alone)
        gradient = policy.trunk_gradient(scored.batch, loss, routes=scored.routes)
        norm = policy.dot(gradient, gradient) ** 0.5
        metrics |= {f"gradient/z_{term}": term_alone.grad_z_MD.norm().item(), f"gradient/trunk_{term}": norm}
        if own_norm and norm:
            metrics[f"gradient/cos_{term}"] = policy.dot(own, gradient) / (own_norm * norm)
    return metrics


def domain_gradients(objective: Objective, policy: Policy, prepared: Prepared) -> dict[str, float]:
    """Return gradient/cos_domains, the mean cosine of two domains' gradients of the policy term (KL included).

    Below 0 an improvement of one domain costs another (Yu et al. 2020, arXiv 2001.06782, definition 1). Domains without
    a gradient are left out; empty with fewer than two others. It takes a forward and backward pass per domain, and
    holds this rank's share of three gradients meanwhile, in fp32. No parameter moves. Collective over all ranks.
    """
    batch, alone = prepared.scored.batch, replace(prepared, contrasted=None)
    total, count = None, 0
    for domain in batch.labels.domain_M.unique().tolist():
        loss = objective.loss(alone, domain=domain)
        gradient = policy.trunk_gradient(batch, loss, routes=prepared.scored.routes)
        norm = policy.dot(gradient, gradient) ** 0.5
        if norm:
            total = gradient / norm if total is None else total.add_(gradient, alpha=1 / norm)
            count += 1
    if total is None or count < 2:
        return {}
    # Of `count` unit vectors, the squared length of the sum is `count` plus twice the sum over pairs of their cosines.
    return {"gradient/cos_domains": (policy.dot(total, total) - count) / (count * (count - 1))}
