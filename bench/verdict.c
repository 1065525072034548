/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * For bench/verdict.py, appended to the unit: judges sources at random out of a map, so that no run finds the last
 * one's path through the tables in the cache. bench_base does the same without judging.
 */

BPF_TABLE_PINNED("array", u32, struct address, bench_sources, 1, PIN_DIR "/bench_sources");

static __always_inline struct scratch *bench_packet(void)
{
	struct scratch *s = begin();
	u32 index = bpf_get_prandom_u32() & 0xffff;
	struct address *source = bench_sources.lookup(&index);

	if (!s || !source)
		return NULL;
	s->packet.source = *source;
	s->packet.ipv4 = is_mapped(source);
	s->packet.port = 1080;
	return s;
}

int bench_base(struct xdp_md *ctx)
{
	struct scratch *s = bench_packet();

	return s ? s->packet.ipv4 : XDP_ABORTED;
}

int bench_verdict(struct xdp_md *ctx)
{
	struct scratch *s = bench_packet();

	return s ? verdict(s, CHARGE_NONE).action : XDP_ABORTED;
}
