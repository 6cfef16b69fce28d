#include "paging/paging.h"
