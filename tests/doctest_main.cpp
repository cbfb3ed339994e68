// doctest's own code and its main(), once for all test programs: it takes as long to compile as many of them.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
