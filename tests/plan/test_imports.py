"""How the modules of plan/ build on each other."""

import graphlib

from tests.test_levels import imports, modules


def test_no_module_of_plan_imports_one_that_imports_it(root):
    inside = {name: file for name, file in modules(root) if name.startswith("jaxmodels.plan.")}
    graph = {name: {other for other in imports(root, file) if other in inside} for name, file in inside.items()}
    order = [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError
    assert order.index("jaxmodels.plan.hlo") < order.index("jaxmodels.plan.figures")
    assert order.index("jaxmodels.plan.figures") < order.index("jaxmodels.plan.search")
