/* load_file: the measured load of every (layer, expert), kept from one run of the daemon to the next, so that
 * the first placement is already the right one; and for people and moed-place to look at.
 *
 * CSV with the header `layer,expert,devices,tokens`: one line for each expert, layers and experts counting up
 * from 0; devices that held it when the file was written, as 0+3, are not read back. Main's thread. */
#ifndef MOED_DAEMON_LOAD_FILE_H
#define MOED_DAEMON_LOAD_FILE_H

#include "moe/moe.h"
#include "proto/base.h"

/* *n tokens counts, malloc'd. A file that does not exist gives none (NULL, 0) and ST_OK; ST_CORRUPT names the
 * line; ST_IO; ST_NO_MEMORY. */
enum status load_file_read(const char *path, struct error *e, uint64_t **tokens, size_t *n);
/* Replaces the file in one go. tokens[L][E]; held[L][E]: a bit for each device that has the expert. */
enum status load_file_write(const char *path, const struct model_shape *shape, const uint64_t *tokens,
                            const uint16_t *held, struct error *e);

#endif
