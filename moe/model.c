#include "moe/moe.h"
