"""The parts that C++ does on a CPU; `compiling` says how it comes to be compiled."""
