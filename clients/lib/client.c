#include "clients/lib/client.h"
