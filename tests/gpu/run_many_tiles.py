"""The fused head on a GPU with several chunks of rows and several tiles of columns, the last of them in the padding."""

from sedd_megatron.parallel import fused_head
from tests.distributed.launch import own_jobs
from tests.distributed.run_fused_head import check

if __name__ == "__main__":
    # So small that a tile of the least rows has the least columns.
    fused_head.TILE_ELEMENTS["cuda"] = 0
    fused_head.MIN_TILE_COLUMNS = fused_head.COLUMN_MULTIPLE["cuda"]
    for job in own_jobs():
        check(*job)
