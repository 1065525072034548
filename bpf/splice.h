/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * What the relay's kernel program shares with userspace; rama_ebpf/kernel/splice.py mirrors it. Host byte order.
 *
 * A tunnel has two directions in neighbouring slots: slot ^ 1 is the way back, and its source is this one's sink.
 */
#ifndef RAMA_EBPF_SPLICE_H
#define RAMA_EBPF_SPLICE_H

enum direction_state {
	DIRECTION_SYNCED = 1, /* `next` is known */
	DIRECTION_ARMED  = 2, /* bytes are redirected; otherwise they go to the source's own reader */
	DIRECTION_BROKEN = 4, /* the kernel could not prove that the bytes are right: nothing goes on */
};

struct direction {
	/* Written by the kernel alone, under the source's socket lock. */
	__u64 redirected; /* bytes handed to the sink */
	__u64 passed;     /* bytes left to the source's own reader; redirected and passed alternate, see `resume` */
	__u64 trimmed;    /* duplicate bytes cut off */
	__u64 before;     /* bytes that were read from the source before this began */
	__u64 told;       /* userspace has been told that bytes pass: the `resume` of that time, and 1 */
	__u32 next;       /* the TCP sequence number that comes next */
	__u32 origin;     /* sequence number at the sink of redirected byte 0 */
	__u32 state;      /* enum direction_state */
	__u32 spills;     /* how often it went from armed to passing because the sink did not take the bytes */
	__u64 cleared;    /* while armed: up to so many redirected bytes the credit holds, whatever is acknowledged */
	/* Written by userspace alone. */
	__u64 cookie;   /* of the source socket */
	__u64 resume;   /* arm when as many bytes have passed: userspace has forwarded them all */
	__u32 watching; /* userspace polls the source: it need not be told */
	__u32 ring;     /* index of the ring in which it is told */
	__u32 credit;   /* bytes that may be on their way to the sink's peer */
	__u32 pad2[9];
};
_Static_assert(sizeof(struct direction) == 128, "direction");

#endif
