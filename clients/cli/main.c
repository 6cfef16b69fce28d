#include "proto/base.h"
int main(void) { return 0; }
