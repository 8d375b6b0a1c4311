/* SPDX-License-Identifier: MIT */
/* Sub-tables of opfpu.c, for the rows of the opcode maps that lead to them. */
#ifndef PYKVM_OPFPU_H
#define PYKVM_OPFPU_H

#include "core.h"

/* D8 to DF, each by O_MOD3. */
extern const struct op x87_map[8][2];
#define X87_ROW(n) { NULL, NULL, NULL, x87_map[n], O_MOD3, F_NONE, 0 }

/*
 * MMX: the row without prefix of an opcode that has others with one.
 *     [0x60] = BY(O_PREFIX, ROWS(MMX_ROW(0x60), OP(punpcklbw, ...), UD, UD)),
 * Each by O_ENC: there is no VEX encoding.
 */
extern const struct op mmx_map_0f[256][2], mmx_map_0f38[32][2], mmx_map_0f3a[16][2];
#define MMX_ROW(opcode) { NULL, NULL, NULL, mmx_map_0f[opcode], O_ENC, F_NONE, 0 }
#define MMX_ROW_38(opcode) { NULL, NULL, NULL, mmx_map_0f38[opcode], O_ENC, F_NONE, 0 }
#define MMX_ROW_3A(opcode) { NULL, NULL, NULL, mmx_map_0f3a[opcode], O_ENC, F_NONE, 0 }

/* Rows of group 15 (0F AE) with a memory operand, /0 /1 /4 /5, and the XSAVEOPT of /6; of
 * group 9 (0F C7) with a memory operand, /3 XRSTORS, /4 XSAVEC, /5 XSAVES. */
extern const struct op state_group15[8], state_group9[8];

#endif
