/// All workers that `godwit bench` can start as processes of their own.
public enum BenchmarkWorkerList {
    public static let all: [any BenchmarkWorker.Type] = [
        CollectWorker.self, StartGapWorker.self,
        MemslotsWorker.self,
        MemslotsStressWorker.self,
        BigGuestWorker.self,
    ]
}
