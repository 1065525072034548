/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * The map of the house. A hook (gate_cgroup.c, gate_lookup.c, gate_xdp.c, egress.c) reads a packet (packet.h) into its
 * scratch; lookup.h finds the listener and the rules that apply, verdict.h judges, rates.h says what still fits, and where
 * a verdict takes effect account.h counts it; witness.c says what it would be. policy.h is what is shared with userspace,
 * maps.h names the maps, sockets.h says which socket serves a connection, answer.h and syn_cookie.h are what XDP sends back.
 *
 * The unit that BCC compiles. The loader puts the headers and the companion programs in place of the include lines
 * (BCC rewrites map accesses only in its main file) and defines PIN_DIR, the directory of the pinned maps.
 *
 * Types come from the UAPI headers and BCC's own bpf.h alone; no internal kernel header is used, so one source
 * compiles on any host without its kernel's headers.
 */
#include <linux/types.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

/* From the libc's headers, which do not compile for BPF. */
#define AF_INET 2
#define AF_INET6 10

#include "policy.h"
#include "maps.h"
#include "packet.h"
#include "lookup.h"
#include "rates.h"
#include "verdict.h"
#include "account.h"
#include "sockets.h"
#include "gate_cgroup.c"
#include "gate_lookup.c"
#ifndef WITHOUT_XDP /* it takes a fifth of the time to compile */
#include "answer.h"
#include "gate_xdp.c"
#endif
#include "egress.c"
#include "witness.c"

/*
 * sock_ops on the proxy's cgroup: counts handshakes that finished on a listener (what then waits to be accepted).
 */
int count_established(struct bpf_sock_ops *ops)
{
	struct packet p = {};
	struct listener listener;
	u64 *total;
	u32 id, wildcard;

	if (ops->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	p.port = ops->local_port;
	CONTEXT_ADDRESS(&p.target, ops->family == AF_INET, ops->local_ip4, ops->local_ip6);
	if (!find_listener(&p, &listener, &wildcard))
		return 1;
	id = listener.id;
	total = established.lookup(&id);
	if (total)
		(*total)++;
	return 1;
}
