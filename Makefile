# One command each. See CONTRIBUTING.md.
PYTHON ?= python
CC ?= cc
PYTHON_FILES = fastblock tests benchmarks setup.py
C_FLAGS = -std=gnu11 -ffp-contract=off -Icsrc
# Every tier that this CPU has; tests/tiers/tiers.c compares them case by case and exits with 1 where they differ.
TIERS = $(shell $(PYTHON) -P -c "import fastblock; print(*fastblock.isas())")
# Sizes that nobody can have are asked for on purpose.
SANITIZER_OPTIONS = allocator_may_return_null=1

.PHONY: test bench sanitize lint

test:
	$(PYTHON) -P -m pytest

bench:
	$(PYTHON) -m benchmarks

sanitize: build/tiers-address build/tiers-thread
	ASAN_OPTIONS=$(SANITIZER_OPTIONS) build/tiers-address $(TIERS)
	TSAN_OPTIONS=$(SANITIZER_OPTIONS) build/tiers-thread $(TIERS)

build/tiers-address: SANITIZERS = address,undefined
build/tiers-thread: SANITIZERS = thread
build/tiers-%: tests/tiers/tiers.c $(wildcard csrc/*)
	mkdir -p build
	$(CC) -O1 -g $(C_FLAGS) -fsanitize=$(SANITIZERS) -fno-sanitize-recover=all tests/tiers/tiers.c csrc/*.c -o $@ -lm -lpthread

lint:
	ruff format --check $(PYTHON_FILES)
	ruff check $(PYTHON_FILES)
	cython-lint --max-line-length 120 fastblock/*.pyx fastblock/*.pxd fastblock/*.pxi
	! grep -nE '.{121}' csrc/* tests/tiers/*.c
	for file in csrc/*.c; do $(CC) -Wall -Wextra -Wshadow -Werror $(C_FLAGS) -fsyntax-only $$file || exit 1; done
