// Found before the toolkit's header of this name when a kernel is built for the emulator.
#pragma once

#include "../emulator.h"
