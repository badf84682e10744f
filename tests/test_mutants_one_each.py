"""One deliberate bug in each file of nano_opd/ turns a test red. The folder tests/mutants/ has all of them."""

import pytest
import suite
from test_mutations import MUTATIONS

PACKAGE = suite.ROOT / "nano_opd"
FILES = [path for folder in (PACKAGE, PACKAGE / "exact") for path in sorted(folder.glob("*.py"))]
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES if path.stem != "__init__"]


@pytest.mark.parametrize("file", NAMES)
def test_a_bug_in_each_file_is_noticed(file, copied_package):
    old, new, guard = MUTATIONS[file][0]
    assert suite.exit_code_on_the_mutant(copied_package, file, old, new, guard) == pytest.ExitCode.TESTS_FAILED
