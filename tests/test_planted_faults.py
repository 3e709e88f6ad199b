"""The faults of tools/planted_faults.py match the present code; `make faults` runs the tests on them."""

import ast

import pytest

from tools.planted_faults import FAULTS, ROOT, Fault, planted


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_the_code_of_its_function(fault: Fault) -> None:
    code = (ROOT / "covid_cls" / fault.file).read_text(encoding="utf-8")
    assert planted(fault, code) != ast.unparse(ast.parse(code))
    for path in fault.first.split():
        assert (ROOT / path).is_file()
